"""Progress numbers of a training run: speed, waiting for neighbors, and what was found."""

import contextlib
import time
from collections.abc import Iterator

import torch

from data_retro.collator import IGNORED_LABEL
from modeling_retro.retrieval_points import last_point_number

from .settings import RetroTrainingArguments

TERA = 1e12


class Progress:
    """This process's counts since the last log.

    Counts are tensors where they come from batches, so that nothing waits for the device.

    Attributes:
        started: time at which the clock started; `paused` moves it.
        waited: seconds that training waited for batches.
        flops: floating-point operations of the training steps.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited, self.flops = 0.0, 0.0
        self.tokens: torch.Tensor | int = 0
        self.chunks: torch.Tensor | int = 0
        self.chunks_with_neighbors: torch.Tensor | int = 0
        self.neighbors: torch.Tensor | int = 0
        self.similarity: torch.Tensor | float = 0.0  # sum over the neighbors

    def add(self, batch: dict[str, torch.Tensor], chunk_size: int, retrieval_stride: int | None) -> None:
        """Count a batch that is trained on. Chunks are counted as retrieval points."""
        tokens = (batch["labels"] != IGNORED_LABEL).sum(-1)
        self.tokens += tokens.sum()
        if {"neighbor_attention_mask", "neighbor_scores"} <= batch.keys():
            there = batch["neighbor_attention_mask"].any(-1)  # (B, C, k)
            first_point, stride = batch.get("first_point", chunk_size), retrieval_stride or chunk_size
            points = last_point_number(tokens, first_point, stride) + 1
            self.chunks += points.clamp(min=0).sum()
            self.chunks_with_neighbors += there.any(-1).sum()
            self.neighbors += there.sum()
            self.similarity += (batch["neighbor_scores"] * there).sum()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock in this block: for evaluations and checkpoints."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - before

    def numbers(self, args: RetroTrainingArguments) -> dict[str, float]:
        """Return the numbers for the log.

        Returns:
            tokens_per_second: of all processes together.
            retrieval_wait: share of the time that training waited for batches.
            chunks_with_neighbors: share of the chunks; only with neighbors.
            mean_similarity: mean over the neighbors that were found; only with neighbors.
            model_flops_utilization: share of the device's peak; only if the peak is known.
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
            numbers["model_flops_utilization"] = self.flops / seconds / (TERA * args.device_peak_tflops)
        return numbers
