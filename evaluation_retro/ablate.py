"""Measure what each choice of retrieval is worth, one at a time, with a table and a plot for each.

The choices: neighbors for each point, the size of the knowledge base, the stride, what is read of a
neighbor, and how the knowledge base is searched. All else stays as the model was trained. The same
tokens are measured every time, so the differences are paired.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retrieval import EmbedderSettings
from retrieval.identity import SEARCHES
from retrieval.searches import load_embedder

from .found import Found, find, kept_find
from .kept import Kept
from .measuring import WindowNats
from .nested_bases import Part, changed_retriever, nested_parts, part_retriever
from .opening import ModelSettings, Opened, open_model
from .report import Report
from .statistics import Gain, bits_per_byte, gain
from .windows import TextSettings, Windows, draw_windows

ABLATIONS = {
    "neighbors": "neighbors read for each point",
    "sizes": "size of the knowledge base",
    "stride": "tokens between two retrieval points",
    "continuation": "what is read of a neighbor",
    "search": "how the knowledge base is searched",
}
TRAINED = "trained"  # the model's own setting of everything
WITHOUT_CONTINUATION = "without_continuation"


@dataclass
class AblateSettings(TextSettings, ModelSettings):
    """The settings of `retro-eval ablate`."""

    only: list[str] = field(
        default_factory=lambda: list(ABLATIONS),
        metadata={"help": "What to vary: neighbors, sizes, stride, continuation, search.", "choices": list(ABLATIONS)},
    )
    neighbors: list[int] = field(
        default_factory=lambda: [1, 2, 3, 4, 6, 8],
        metadata={"help": "Numbers of neighbors, also more than trained with."},
    )
    sizes: list[float] = field(
        default_factory=lambda: [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0],
        metadata={"help": "Shares of the knowledge base. Each part contains the smaller ones, by document."},
    )
    strides: list[int] = field(
        default_factory=list,
        metadata={"help": "Tokens between two points, at most a chunk. Default: 1, 1/2, 1/4 and 1/8 of a chunk."},
    )
    batch_size: int = field(default=4, metadata={"help": "Windows in a forward pass."})
    output_dir: str = field(default="ablations", metadata={"help": "Folder of the report and of finished parts."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("only", "neighbors", "sizes", "strides"):
            if not isinstance(getattr(self, name), list):  # a single one in YAML
                setattr(self, name, [getattr(self, name)])
        if unknown := [name for name in self.only if name not in ABLATIONS]:
            raise ValueError(f"only is {unknown[0]!r}. Choose from {', '.join(ABLATIONS)}.")
        for name, values in (
            ("neighbors", self.neighbors),
            ("strides", self.strides),
            ("batch_size", [self.batch_size]),
        ):
            if any(value < 1 for value in values):
                raise ValueError(f"{name} is {min(values)}. Give 1 or more.")
        if wrong := [share for share in self.sizes if not 0 < share <= 1]:
            raise ValueError(f"sizes has {wrong[0]}. Give shares above 0, up to 1.")


SETTINGS = AblateSettings


@dataclass(frozen=True)
class Variant:
    """One setting of one choice.

    Attributes:
        label: for the table.
        key: of its measurement in the folder of finished parts; `TRAINED` for the model's own.
        found: the neighbors that it reads.
    """

    label: str
    key: str
    found: Found


@dataclass(frozen=True)
class Line:
    """The measurement of a variant: bits per byte, and what they save over two others."""

    label: str
    is_trained: bool
    bits_per_byte: float
    over_decoder: Gain
    over_trained: Gain


class Ablations:
    """The variants and their measurements.

    Args:
        settings: of the command.
        opened: the model and its knowledge base.
        windows: N windows of T tokens.
        kept: the folder of finished parts.

    Raises:
        ValueError: a stride is longer than a chunk, or no neighbors are found.
    """

    def __init__(self, settings: AblateSettings, opened: Opened, windows: Windows, kept: Kept) -> None:
        assert opened.retriever is not None, "open_model refuses to open without one"
        self.settings, self.opened, self.windows, self.kept = settings, opened, windows, kept
        self.retriever, config = opened.retriever, opened.model.config
        self.chunk_size, self.k = config.chunk_size, config.num_neighbors
        self.stride = config.retrieval_stride or config.chunk_size
        self.strides = settings.strides or sorted(
            {max(self.chunk_size // part, 1) for part in (1, 2, 4, 8)}, reverse=True
        )
        if max(self.strides) > self.chunk_size:
            raise ValueError(
                f"strides has {max(self.strides)}, but the model's chunks have {self.chunk_size} tokens. Give strides "
                "up to that."
            )
        self.trained = kept_find(kept, "held_out", self.retriever, windows, self.stride)
        self.measured = WindowNats(opened.model, windows, kept, batch_size=settings.batch_size)
        self.text_bytes = windows.text_bytes(opened.tokenizer, self.chunk_size)
        self.notes: list[str] = []

    def variants(self, name: str) -> Iterator[Variant]:
        """Yield the variants of a choice."""
        makers: dict[str, Callable[[], Iterator[Variant]]] = {
            "neighbors": self._neighbors,
            "sizes": self._sizes,
            "stride": self._strides,
            "continuation": self._continuation,
            "search": self._searches,
        }
        return makers[name]()

    def decoder(self) -> np.ndarray:
        """Return the decoder's nats (N,) in reach of neighbors."""
        return self._in_reach(self.measured.off())

    def line(self, variant: Variant) -> Line:
        """Measure a variant."""
        nats, trained = (
            self._in_reach(self.measured.on(its.key, its.found))
            for its in (variant, Variant("", TRAINED, self.trained))
        )
        over = (gain(other - nats, self.text_bytes, self.windows.doc_ids) for other in (self.decoder(), trained))
        return Line(variant.label, variant.key == TRAINED, bits_per_byte(nats, self.text_bytes), *over)

    def _in_reach(self, nats: np.ndarray) -> np.ndarray:
        return nats[:, self.chunk_size - 1 :].astype(np.float64).sum(1)

    def _neighbors(self) -> Iterator[Variant]:
        most = max(self.settings.neighbors)
        found = kept_find(self.kept, "held_out", self.retriever.with_neighbors(most), self.windows, self.stride)
        for k in sorted(set(self.settings.neighbors)):
            yield Variant(str(k), TRAINED, self.trained) if k == self.k else Variant(str(k), f"k_{k}", found.best(k))

    def _sizes(self) -> Iterator[Variant]:
        for part in nested_parts(self.retriever.store, self.settings.sizes):
            label = f"{Fraction(part.share).limit_denominator(1000)} ({part.chunks:,} chunks)"
            if part.share == 1:
                yield Variant(label, TRAINED, self.trained)
                continue

            def search(part: Part = part) -> dict[str, np.ndarray]:
                with part_retriever(self.retriever, part) as retriever:
                    return find(retriever, self.windows, self.stride).arrays()

            key = f"documents_{part.documents}"
            found = Found.of(self.kept.arrays(f"neighbors_{key}", search), self.stride)
            yield Variant(label, key, found)

    def _strides(self) -> Iterator[Variant]:
        for stride in self.strides:
            found = kept_find(self.kept, "held_out", self.retriever, self.windows, stride)
            yield Variant(str(stride), TRAINED if stride == self.stride else f"stride_{stride}", found)

    def _continuation(self) -> Iterator[Variant]:
        yield Variant("chunk and continuation", TRAINED, self.trained)
        if self.retriever.neighbor_length > self.chunk_size:
            yield Variant("chunk only", WITHOUT_CONTINUATION, self.trained.without_continuation(self.chunk_size))
        else:
            self.notes.append("The model reads no continuation: its neighbors have no more tokens than a chunk.")

    def _searches(self) -> Iterator[Variant]:
        identity = self.retriever.store.identity()
        possible = SEARCHES if identity.search == "hybrid" else (identity.search,)
        for name in possible:
            if name == self.retriever.search:
                yield Variant(name, TRAINED, self.trained)
                continue
            embedder = self.retriever.embedder
            if embedder is None and name != "bm25":
                embedding = EmbedderSettings.of(self.settings)
                device = self.settings.device
                embedder = load_embedder(identity, name, self.settings.embedding_model, embedding, device=device)
            retriever = changed_retriever(self.retriever, search=name, embedder=embedder)
            yield Variant(
                name, f"search_{name}", kept_find(self.kept, "held_out", retriever, self.windows, self.stride)
            )
        if missing := [name for name in SEARCHES if name not in possible]:
            self.notes.append(
                f"The collection was built for search {identity.search} and cannot be searched by "
                f"{' or '.join(missing)}. To compare them, ingest its documents with --search hybrid."
            )


def write_report(settings: AblateSettings, ablations: Ablations) -> None:
    """Measure what is asked for, write the files of the report, and print the tables."""
    report = Report(Path(settings.output_dir), "ablations", f"Ablations of {settings.name}")
    alone = bits_per_byte(ablations.decoder(), ablations.text_bytes)
    report.text(
        f"{len(ablations.windows)} windows of {settings.window} tokens, those in reach of neighbors; the decoder alone "
        f"needs {alone:.4f} bits per byte. Trained with: {ablations.k} neighbors, stride {ablations.stride}, search "
        f"{ablations.retriever.search}. Gains are in bits per byte, with 95 % intervals over documents; those over the "
        "trained setting are paired."
    )
    measured: dict[str, list[Line]] = {}
    for name in dict.fromkeys(settings.only):
        measured[name] = [ablations.line(variant) for variant in ablations.variants(name)]
        rows = [
            [
                f"{line.label} (trained)" if line.is_trained else line.label,
                f"{line.bits_per_byte:.4f}",
                str(line.over_decoder),
                "" if line.is_trained else str(line.over_trained),
            ]
            for line in measured[name]
        ]
        columns = [ABLATIONS[name], "bits per byte", "gain over decoder", "gain over trained setting"]
        report.table(columns, rows, title=name)
        for note in ablations.notes:
            report.text(note)
        ablations.notes.clear()
        report.plot(name, partial(draw, lines=measured[name], what=ABLATIONS[name]))
    report.numbers({"windows": len(ablations.windows), "window": settings.window, "decoder_bits_per_byte": alone})
    report.numbers({"ablations": measured})
    report.save()


def draw(axes: Any, lines: list[Line], what: str) -> None:
    """Draw the gain of each variant over the decoder, with its interval."""
    gains, places = [line.over_decoder for line in lines], range(len(lines))
    axes.plot(places, [value.value for value in gains], color="C0", linewidth=0.8)
    for place, line in enumerate(lines):
        axes.plot([place], [line.over_decoder.value], "s" if line.is_trained else "o", color="C0")
    axes.vlines(places, [value.low for value in gains], [value.high for value in gains], color="C0")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xticks(places, [line.label.replace(" (", "\n(") for line in lines])
    axes.set_xlim(-0.5, len(lines) - 0.5)
    axes.set_xlabel(f"{what} (square: as trained)")
    axes.set_ylabel("bits per byte saved over the decoder")


def run(settings: AblateSettings) -> None:
    """Measure, and write the report."""
    documents = list(settings.documents())
    opened = open_model(settings)
    try:
        windows = draw_windows(documents, opened.tokenizer, settings)
        of = opened.describe() | {"windows": windows.fingerprint()}
        write_report(settings, Ablations(settings, opened, windows, Kept(Path(settings.output_dir) / "parts", of)))
    finally:
        opened.close()
