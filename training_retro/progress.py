"""Progress numbers of a training run: speed, waiting for neighbors, and what was found."""

import contextlib
import time
from collections.abc import Iterator

import torch

from .arguments import RetroTrainingArguments


class Progress:
    """This process's counts since the last log. They are tensors, so that nothing waits for the device."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited, self.flops = 0.0, 0.0
        self.tokens: torch.Tensor | int = 0
        self.chunks: torch.Tensor | int = 0
        self.chunks_with_neighbors: torch.Tensor | int = 0
        self.neighbors: torch.Tensor | int = 0
        self.similarity: torch.Tensor | float = 0.0  # summed over neighbors

    def add(self, batch: dict[str, torch.Tensor], chunk_size: int) -> None:
        """A batch that is trained on."""
        tokens = (batch["labels"] != -100).sum(-1)
        self.tokens += tokens.sum()
        if {"neighbor_attention_mask", "neighbor_scores"} <= batch.keys():
            there = batch["neighbor_attention_mask"].any(-1)  # (B, C, k)
            self.chunks += (tokens // chunk_size).sum()
            self.chunks_with_neighbors += there.any(-1).sum()
            self.neighbors += there.sum()
            self.similarity += (batch["neighbor_scores"] * there).sum()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The clock of training stands still: for evaluations and checkpoints."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - before

    def numbers(self, args: RetroTrainingArguments) -> dict[str, float]:
        """tokens_per_second of all processes; retrieval_wait, a share of the time; of chunks, the share that has a neighbor, and
        the mean similarity of these; utilization, if the peak is known.
        """
        seconds = time.perf_counter() - self.started
        numbers = {
            "tokens_per_second": args.world_size * int(self.tokens) / seconds,
            "retrieval_wait": self.waited / seconds,
        }
        if self.chunks:
            numbers["chunks_with_neighbors"] = int(self.chunks_with_neighbors) / int(self.chunks)
            numbers["mean_similarity"] = float(self.similarity) / max(int(self.neighbors), 1)
        if args.device_peak_tflops is not None:
            numbers["model_flops_utilization"] = self.flops / seconds / (1e12 * args.device_peak_tflops)
        return numbers
