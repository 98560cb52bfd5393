"""Measure what retrieval gains by how much a chunk shares with its neighbors.

For each predicted chunk, the longest run of tokens that it shares with any neighbor is found, once
with its query as one text, as in Borgeaud et al. 2022 (section 2.6), and once alone. Chunks are put
into bins by that run. A gain in chunks that share little is more than copying.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .bits_per_byte import byte_lengths
from .copy_baseline import WEIGHTS, best_weight, copied_probability, mixture_nats
from .found import Found, kept_find
from .kept import Kept
from .measuring import WindowNats
from .opening import ModelSettings, Opened, open_model
from .overlap import shared_runs
from .report import Report
from .statistics import Gain, bits_per_byte, gain
from .windows import TextSettings, Windows, draw_windows

OFF, ON, COPY, SHUFFLED = "decoder", "on", "copy baseline", "shuffled"
WITH_QUERY, ALONE = "query and predicted chunk", "predicted chunk alone"
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of a chunk, as in the paper's figure
RUN = 8  # tokens: chunks that share no run as long have little to copy
ENOUGH = 1000  # chunks
WINDOWS = 32  # whose copies are looked up at once


@dataclass
class LeakageSettings(TextSettings, ModelSettings):
    """The settings of `retro-eval leakage`."""

    training_texts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts that the copy baseline's weight is chosen on: files, folders, or names of datasets. Without "
            "them it is left out."
        },
    )
    batch_size: int = field(default=4, metadata={"help": "Windows in a forward pass."})
    output_dir: str = field(default="leakage", metadata={"help": "Folder of the report and of finished parts."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.training_texts, str):
            self.training_texts = [self.training_texts]
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}. Give at least 1.")
        if self.windows < 2:
            raise ValueError(
                f"windows is {self.windows}. Give at least 2: shuffled neighbors come from another window."
            )


SETTINGS = LeakageSettings


@dataclass
class Chunks:
    """The predicted chunks: C of each of N windows, all (N, C).

    Attributes:
        nats: under each condition.
        text_bytes: of the predicted text.
        doc_ids: the documents.
        runs: the longest shared run in tokens, by what is compared.
    """

    nats: dict[str, np.ndarray]
    text_bytes: np.ndarray
    doc_ids: np.ndarray
    runs: dict[str, np.ndarray]


@dataclass
class Line:
    """The measurement of some of the chunks.

    Attributes:
        label: which ones.
        chunks: how many.
        bits_per_byte: under each condition; empty without text.
        gains: what the neighbors save over each other condition; empty without text.
    """

    label: str
    chunks: int
    bits_per_byte: dict[str, float]
    gains: dict[str, Gain]

    @classmethod
    def of(cls, label: str, chunks: Chunks, chosen: np.ndarray) -> "Line":
        """Measure the chunks (N, C) that are chosen."""
        count, size = int(chosen.sum()), chunks.text_bytes[chosen]
        if not size.sum():
            return cls(label, count, {}, {})
        nats = {name: its[chosen] for name, its in chunks.nats.items()}
        gains = {name: gain(its - nats[ON], size, chunks.doc_ids[chosen]) for name, its in nats.items() if name != ON}
        return cls(label, count, {name: bits_per_byte(its, size) for name, its in nats.items()}, gains)

    def cells(self, conditions: Sequence[str]) -> list[str]:
        """Return the line of a table."""
        bits = [f"{self.bits_per_byte[name]:.4f}" if self.bits_per_byte else "–" for name in conditions]
        gains = [str(self.gains.get(name, "–")) for name in conditions if name != ON]
        return [self.label, f"{self.chunks:,}", *bits, *gains]


def bins(chunk_size: int) -> list[tuple[str, int, float]]:
    """Return label, least and greatest run of each bin: 0, 1, 2–3, 4–7, …, a chunk or more."""
    firsts = [0, *(2**power for power in range(chunk_size.bit_length()) if 2**power < chunk_size), chunk_size]
    lasts = [first - 1 for first in firsts[1:]]
    ranges = zip(firsts, lasts, strict=False)
    named = [(str(first) if first == last else f"{first}–{last}", first, float(last)) for first, last in ranges]
    return [*named, (f"{chunk_size}+", chunk_size, np.inf)]


def by_bin(chunks: Chunks, what: str, chunk_size: int) -> list[Line]:
    """Measure the chunks of each bin."""
    runs = chunks.runs[what]
    return [Line.of(label, chunks, (runs >= first) & (runs <= last)) for label, first, last in bins(chunk_size)]


def cumulative(chunks: Chunks, what: str, chunk_size: int) -> list[Line]:
    """Measure the chunks that are left when those with a longer run than each share are removed."""
    limits = {f"≤ {share:g} ({int(share * chunk_size)} tokens)": int(share * chunk_size) for share in SHARES}
    lines = [Line.of(label, chunks, chunks.runs[what] <= limit) for label, limit in limits.items()]
    return [*lines, Line.of("all", chunks, chunks.runs[what] >= 0)]


class LeakageMeasurement:
    """The measurements that the report needs.

    Args:
        settings: of the command.
        opened: the model and its knowledge base.
        windows: N windows of T tokens.
        kept: the folder of finished parts.
    """

    def __init__(self, settings: LeakageSettings, opened: Opened, windows: Windows, kept: Kept) -> None:
        assert opened.retriever is not None, "open_model refuses to open without one"
        self.settings, self.opened, self.retriever, self.windows, self.kept = (
            settings,
            opened,
            opened.retriever,
            windows,
            kept,
        )
        self.chunk_size = opened.model.config.chunk_size
        self.stride = opened.model.config.retrieval_stride

    def chunks(self) -> Chunks:
        """Measure all predicted chunks under all conditions."""
        tokens, first = self.windows.tokens, self.chunk_size
        found = kept_find(self.kept, "held_out", self.retriever, self.windows, self.stride)
        measured = WindowNats(self.opened.model, self.windows, self.kept, batch_size=self.settings.batch_size)
        seed = self.settings.seed
        nats = {OFF: measured.off(), ON: measured.on(ON, found)}
        if self.settings.training_texts:
            nats[COPY] = self._mixed(nats[OFF], self.windows, found, [self.copy_weight()])[0]
        nats[SHUFFLED] = measured.on(f"{SHUFFLED}_{seed}", found.shuffled(seed))
        starts = np.arange(0, tokens.shape[1] - first, found.stride)

        def of_chunks(array: np.ndarray) -> np.ndarray:  # (N, T - first) of tokens first, …, T - 1
            return np.add.reduceat(array.astype(np.float64), starts, axis=1)

        sizes = byte_lengths(self.opened.tokenizer.hf_tokenizer)[tokens[:, first:]].numpy()
        runs = {what: shared_runs(tokens, found, first, with_query=what == WITH_QUERY) for what in (WITH_QUERY, ALONE)}
        return Chunks(
            {name: of_chunks(its[:, first - 1 :]) for name, its in nats.items()},
            of_chunks(sizes),
            np.repeat(np.array(self.windows.doc_ids)[:, None], len(starts), axis=1),
            runs,
        )

    def copy_weight(self) -> float:
        """Return the copier's weight that is best on training texts.

        Raises:
            ValueError: they are too short, or no neighbors are found.
        """
        documents = self.settings.documents(self.settings.training_texts)
        windows = draw_windows(documents, self.opened.tokenizer, self.settings, "training_texts")
        name = f"training_{windows.fingerprint()}"
        found = kept_find(self.kept, name, self.retriever, windows, self.stride)
        off = WindowNats(self.opened.model, windows, self.kept, name, self.settings.batch_size).off()
        totals = self._mixed(off, windows, found, WEIGHTS.tolist())[:, :, self.chunk_size - 1 :].sum((1, 2))
        weight = best_weight(torch.from_numpy(totals))
        assert weight is not None, "the windows have tokens"
        return weight

    def _mixed(self, off: np.ndarray, windows: Windows, found: Found, weights: list[float]) -> np.ndarray:
        """Return the nats (weights, N, T − 1) of the decoder mixed with the copier."""
        parts = []
        for start in range(0, len(windows), WINDOWS):
            rows = slice(start, start + WINDOWS)
            read = found.rows(rows)
            copied, there = copied_probability(
                windows.tokens[rows], read.ids, read.mask, self.chunk_size, retrieval_stride=found.stride
            )
            alone = torch.from_numpy(off[rows])
            parts.append(torch.stack([mixture_nats(alone, copied, there, weight) for weight in weights]))
        return torch.cat(parts, 1).numpy()


def verdict(line: Line) -> str:
    """Say whether neighbors save anything in the chunks that share no run of 8 tokens with them."""
    if not line.gains:
        return f"Every chunk shares a run of {RUN} tokens with its neighbors ({line.label})."
    value = line.gains[OFF]
    said = (
        f"Neighbors save {value} bits per byte in the {line.chunks:,} chunks without a shared {RUN}-gram ({line.label})"
    )
    if np.isnan(value.low):
        return f"{said}. One document has no interval."
    if value.low > 0:
        return f"{said}. There is a gain: the interval excludes zero."
    if value.high < 0:
        return f"{said}. There is a loss: the interval excludes zero."
    return f"{said}. No gain is shown: the interval includes zero."


def write_report(settings: LeakageSettings, chunks: Chunks, chunk_size: int) -> None:
    """Write leakage.json, leakage.md and the plots, and print the tables."""
    report = Report(Path(settings.output_dir), "leakage", f"Leakage of {settings.name}")
    conditions = list(chunks.nats)
    count, documents = chunks.text_bytes.size, len(np.unique(chunks.doc_ids))
    report.text(
        f"{count:,} chunks of {documents} documents, in windows of {settings.window} tokens. Chunks are put into bins "
        "by the longest run of tokens that they share with any neighbor's text. Bits per byte are of the predicted "
        "chunk; gains are what its neighbors save, with 95 % intervals over documents."
    )
    if count < ENOUGH:
        report.text(f"Fewer than {ENOUGH:,} chunks were measured, so bins are small. Measure more --windows.")
    if COPY not in conditions:
        report.text("The copy baseline is left out: its weight is chosen on --training_texts, and there are none.")
    columns = ["chunks", *conditions, *(f"gain over {name}" for name in conditions if name != ON)]
    binned = {what: by_bin(chunks, what, chunk_size) for what in chunks.runs}
    kept = {what: cumulative(chunks, what, chunk_size) for what in chunks.runs}
    without = {what: Line.of(what, chunks, chunks.runs[what] < RUN) for what in chunks.runs}
    for what in chunks.runs:
        rows = [line.cells(conditions) for line in binned[what]]
        report.table(["longest run", *columns], rows, title=f"By longest shared run: {what}")
        rows = [line.cells(conditions) for line in kept[what]]
        report.table(["run in chunks", *columns], rows, title=f"Chunks with a longer run removed: {what}")
        report.text(verdict(without[what]))
    report.plot("gain", partial(draw_gains, binned=binned))
    report.plot("cumulative", partial(draw_cumulative, lines=kept[WITH_QUERY], conditions=conditions))
    report.numbers({"chunks": count, "documents": documents, "window": settings.window, "by_longest_run": binned})
    report.numbers({"longer_runs_removed": kept, f"no_shared_{RUN}_gram": without})
    report.save()


def draw_gains(axes: Any, binned: dict[str, list[Line]]) -> None:
    """Draw the gain over the decoder by longest shared run, with its intervals."""
    for number, (what, lines) in enumerate(binned.items()):
        there = [(place + 0.16 * (number - 0.5), line.gains[OFF]) for place, line in enumerate(lines) if line.gains]
        places, gains = [place for place, _ in there], [value for _, value in there]
        axes.plot(places, [value.value for value in gains], "o", color=f"C{number}", label=what)
        axes.vlines(places, [value.low for value in gains], [value.high for value in gains], color=f"C{number}")
    axes.axhline(0, color="gray", linewidth=0.8)
    lines = next(iter(binned.values()))
    axes.set_xticks(range(len(lines)), [line.label for line in lines])
    axes.set_xlabel("longest run of tokens shared with a neighbor")
    axes.set_ylabel("bits per byte saved over the decoder")
    axes.legend()


def draw_cumulative(axes: Any, lines: list[Line], conditions: list[str]) -> None:
    """Draw the bits per byte of the chunks that are left, as in the paper's figure."""
    there = [(place, line) for place, line in enumerate(lines) if line.bits_per_byte]
    for name in conditions:
        bits = [line.bits_per_byte[name] for _, line in there]
        axes.plot([place for place, _ in there], bits, marker="o", label=name)
    axes.set_xticks(range(len(lines)), [line.label.partition(" (")[0] for line in lines])
    axes.set_xlabel("longest shared run, in chunks; chunks with a longer one are removed")
    axes.set_ylabel("bits per byte")
    axes.legend()


def run(settings: LeakageSettings) -> None:
    """Measure, and write the report."""
    documents = list(settings.documents())
    opened = open_model(settings)
    try:
        windows = draw_windows(documents, opened.tokenizer, settings)
        of = opened.describe() | {"windows": windows.fingerprint()}
        kept = Kept(Path(settings.output_dir) / "parts", of)
        chunks = LeakageMeasurement(settings, opened, windows, kept).chunks()
        write_report(settings, chunks, opened.model.config.chunk_size)
    finally:
        opened.close()
