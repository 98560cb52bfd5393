"""Measure what searching more often than once a chunk gains and costs.

    python benchmarks/strides.py runs/first_points    # minutes; can be resumed

Corpus, knowledge base, decoder and training are those of `first_points.py`, which can share the
folder. A copy head alone, and one with cross-attention by matches, are fitted onto a frozen decoder
with one search a chunk, as in the paper. Then both read held-out documents at several strides.

Printed are two tables in Markdown. The first measures held-out sequences whose neighbors are given:
searches a token, bits per byte, what they save against one search a chunk, and the time of a
forward. The second measures `generate()`, searches included. Intervals are two standard errors over
sequences.

The sides take turns. Times are the processor's, of all threads of this process, so other work on
the machine changes them little: the median, the least and the most over batches or prompts.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import first_points
import numpy as np
import torch
import torch.nn.functional as F
from first_points import BATCH, BLOCK, CHUNK
from machine import machine, spread
from transformers import AutoTokenizer

from data_retro.collator import RetroDataCollator
from evaluation_retro import byte_lengths, paired_gain
from modeling_retro import RetroForCausalLM
from retrieval import MilvusRetriever

STRIDES = (None, 64, 32, 16, 8)  # None: without neighbors
READERS = {"copy_head": "copy head alone", "both": "copy head and cross-attention"}
PROMPTS = (64, 73, 82, 91, 100, 109, 118, 128)  # tokens of each prompt
NEW = 128  # tokens to generate
Side = tuple[str, int | None]  # a reader and a stride


@dataclass
class Measured:
    """The measurements of one side.

    Attributes:
        nats: of each sequence.
        searches: of all sequences, or of all prompts.
        tokens: of all sequences, or generated after all prompts.
        milliseconds: processor time for a token, of each batch or prompt.
    """

    nats: list[float] = field(default_factory=list)
    searches: int = 0
    tokens: int = 0
    milliseconds: list[float] = field(default_factory=list)

    def add(self, seconds: float, tokens: int, searches: int) -> None:
        """Add a batch or a prompt."""
        self.milliseconds.append(1000 * seconds / tokens)
        self.tokens += tokens
        self.searches += searches


def options(stride: int | None) -> dict[str, Any]:
    """Return the arguments of a forward, or of `generate()`, at a stride."""
    return {"use_retrieval": False} if stride is None else {"retrieval_stride": stride}


@torch.no_grad()
def read(
    models: dict[str, RetroForCausalLM],
    rows: list[dict],
    retriever: MilvusRetriever,
    strides: Sequence[int | None] = STRIDES,
) -> dict[Side, Measured]:
    """Measure sequences, their neighbors fetched before.

    Args:
        rows: {"input_ids": ints, "doc_ids": for each chunk a list of ids} of each sequence.
    """
    measured = {(reader, stride): Measured() for reader in models for stride in strides}
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        collators = {s: RetroDataCollator() if s is None else RetroDataCollator(retriever, s) for s in strides}
        batches = {stride: collate(part) for stride, collate in collators.items()}
        for (reader, stride), side in measured.items():
            batch = dict(batches[stride])
            labels = batch.pop("labels")[:, 1:]
            searches = int(batch["neighbor_attention_mask"].flatten(2).any(-1).sum()) if stride else 0
            started = time.process_time()
            logits = models[reader](**batch, **options(stride)).logits
            side.add(time.process_time() - started, sum(len(row["input_ids"]) for row in part), searches)
            nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")  # 0 for padding
            side.nats += nats.sum(1).tolist()
    return measured


def write(
    models: dict[str, RetroForCausalLM],
    prompts: list[list[int]],
    strides: Sequence[int | None] = STRIDES,
    new: int = NEW,
) -> dict[Side, Measured]:
    """Measure `generate()` of models with a retriever. The first prompt is also a warm-up."""
    measured = {(reader, stride): Measured() for reader in models for stride in strides}
    for number, prompt in enumerate([prompts[0], *prompts]):
        tokens = torch.tensor([prompt])
        settings: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        settings |= {"attention_mask": torch.ones_like(tokens), "return_dict_in_generate": True}
        for (reader, stride), side in measured.items():
            started = time.process_time()
            output = models[reader].generate(tokens, **settings, **options(stride))
            if number:
                side.add(time.process_time() - started, new, len(output.retrieved[0]))
    return measured


def read_table(measured: dict[Side, Measured], text_bytes: np.ndarray) -> list[str]:
    """Return the lines of the first table."""
    lines = [
        "| reader | stride | searches a token | bits per byte | saved against 64 | forward, ms a token |",
        "|---|---|---|---|---|---|",
    ]
    for (reader, stride), side in measured.items():
        saved = np.array(measured[reader, CHUNK].nats) - np.array(side.nats)
        gain, error = paired_gain(saved, text_bytes)
        bits = sum(side.nats) / np.log(2) / text_bytes.sum()
        saving = "" if stride == CHUNK else f"{gain:+.4f} ± {2 * error:.4f}"
        searches = side.searches / side.tokens
        lines.append(
            f"| {READERS[reader]} | {stride or 'no search'} | {searches:.4f} | {bits:.4f} | {saving} | "
            f"{spread(side.milliseconds, digits=3)} |"
        )
    return lines


def write_table(measured: dict[Side, Measured]) -> list[str]:
    """Return the lines of the second table."""
    lines = ["| reader | stride | searches a new token | generate(), ms a new token |", "|---|---|---|---|"]
    return lines + [
        f"| {READERS[reader]} | {stride or 'no search'} | {side.searches / side.tokens:.4f} | "
        f"{spread(side.milliseconds)} |"
        for (reader, stride), side in measured.items()
    ]


def time_searches(retriever: MilvusRetriever, prompts: list[list[int]]) -> str:
    """Return the processor time of a search for one chunk."""
    milliseconds = []
    for prompt in [prompts[0], *prompts]:
        started = time.process_time()
        retriever.retrieve([prompt[-CHUNK:]])
        milliseconds.append(1000 * (time.process_time() - started))
    return spread(milliseconds[1:], " ms")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps texts, knowledge base and models")
    parser.add_argument("--steps", type=int, default=60, help="steps of a fit, 2,048 tokens each")
    arguments = parser.parse_args()
    folder = arguments.folder
    print(machine(), flush=True)
    first_points.prepare(folder)
    models = {reader: first_points.fit(folder, "paper", reader, 0, arguments.steps).eval() for reader in READERS}
    retriever = first_points.open_retriever(folder)
    rows = list(first_points.held_out_sequences(folder).select_columns(["input_ids", "doc_ids"]))
    token_bytes = byte_lengths(AutoTokenizer.from_pretrained(folder / "tokenizer")).numpy()
    text_bytes = np.array([token_bytes[row["input_ids"][1:]].sum() for row in rows])
    print(f"{len(rows)} sequences of {BLOCK} tokens")
    print(*read_table(read(models, rows, retriever), text_bytes), sep="\n", flush=True)
    prompts = [row["input_ids"][:length] for row, length in zip(rows, PROMPTS, strict=False)]
    for model in models.values():
        model.set_retriever(retriever)
    print(f"\n{len(prompts)} prompts, {NEW} new tokens; a search takes {time_searches(retriever, prompts)}")
    print(*write_table(write(models, prompts)), sep="\n")
    retriever.close()


if __name__ == "__main__":
    main()
