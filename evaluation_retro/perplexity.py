"""Measure loss, perplexity and bits per byte of any causal model on text.

Each document is cut into windows that overlap. Every token but the document's first is predicted
once, in the window that shows the most text before it. Loss is in nats a token, and perplexity is
its exponential. Bits per byte count the UTF-8 bytes of the text, so that models with different
tokenizers can be compared.

With a knowledge base, the same tokens are measured with the neighbors on, off and shuffled (those
of another window), and, if it is given, with a second knowledge base. Each difference from "off"
has its 95 % confidence interval, by bootstrapping documents.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_retro.collator import IGNORED_LABEL, NEIGHBOR_FIELDS, RetroDataCollator
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer, Document, MilvusRetriever
from retrieval.settings import same_setting

from .bits_per_byte import byte_lengths, shuffle_neighbors
from .kept import Arrays, Kept
from .opening import ModelSettings, Opened, describe_retriever, open_model
from .report import Report
from .statistics import Gain, bits_per_byte, gain
from .windows import TextSettings, read_texts

OFF, ON, SHUFFLED, OTHER = "off", "on", "shuffled", "second knowledge base"
BATCHES_KEPT = 4  # in one file: a break loses at most so many


@dataclass
class PerplexitySettings(ModelSettings):
    """The settings of `retro-eval perplexity`."""

    texts: list[str] = same_setting(TextSettings, "texts")
    text_field: str = same_setting(TextSettings, "text_field")
    doc_id_field: str | None = same_setting(TextSettings, "doc_id_field")
    documents: int | None = field(default=None, metadata={"help": "Documents to measure at most. Default: all."})
    window: int = field(default=1024, metadata={"help": "Tokens in a window, the most that any position can see."})
    window_stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens between two windows. Fewer show more text before each token, and take longer. Default: "
            "half a window."
        },
    )
    second_knowledge_base: str | None = field(
        default=None, metadata={"help": "Another knowledge base to read from, such as one of other texts."}
    )
    second_collection_name: str | None = field(
        default=None, metadata={"help": "Collection in the second knowledge base. Default: the first one's."}
    )
    batch_size: int = field(default=4, metadata={"help": "Windows in a forward pass."})
    seed: int = same_setting(TextSettings, "seed")
    output_dir: str = field(default="perplexity", metadata={"help": "Folder of the report and of finished parts."})

    def __post_init__(self) -> None:
        self.window_stride = self.window_stride or max(self.window // 2, 1)
        if not 1 <= self.window_stride < self.window:
            raise ValueError(
                f"window_stride is {self.window_stride}. Give a number from 1 to below the window, {self.window}."
            )
        for name, least in (("batch_size", 2 if self.knowledge_base else 1), ("documents", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                why = " Shuffled neighbors come from another window of the batch." if least > 1 else ""
                raise ValueError(f"{name} is {getattr(self, name)}. Give at least {least}.{why}")
        if self.second_knowledge_base is not None and self.knowledge_base is None:
            raise ValueError("second_knowledge_base is given, but knowledge_base is not. Name the first one there.")

    def read(self) -> list[Document]:
        """Read the documents to measure."""
        return list(islice(read_texts(self.texts, self.text_field, self.doc_id_field), self.documents))


SETTINGS = PerplexitySettings


@dataclass(frozen=True)
class Window:
    """A part of a document.

    Attributes:
        document: the document's number.
        tokens: the tokens of the window.
        first: the first token that this window predicts, at least 1.
    """

    document: int
    tokens: list[int]
    first: int


def overlapping_windows(document: int, tokens: list[int], length: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows in which every token but the first is predicted once."""
    predicted = 1
    for start in range(0, len(tokens), stride):
        end = min(start + length, len(tokens))
        if end > predicted:
            yield Window(document, tokens[start:end], predicted - start)
            predicted = end


@dataclass
class Measured:
    """The measurement of N documents.

    Attributes:
        nats: (N, conditions) of each document.
        sizes: (N, 2), the tokens and the bytes that are predicted.
        conditions: their names, "off" first.
    """

    nats: np.ndarray
    sizes: np.ndarray
    conditions: list[str]

    def of(self, condition: str) -> dict[str, float]:
        """Return loss, perplexity and bits per byte under a condition."""
        nats = self.nats[:, self.conditions.index(condition)]
        loss = float(nats.sum() / self.sizes[:, 0].sum())
        return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte(nats, self.sizes[:, 1])}

    def gain(self, condition: str, over: str) -> Gain:
        """Return the bits per byte that a condition saves over another one."""
        ours, theirs = (self.nats[:, self.conditions.index(name)] for name in (condition, over))
        return gain(theirs - ours, self.sizes[:, 1])


class WindowMeasurement:
    """The forward passes over windows, with the neighbors of one or several retrievers.

    Args:
        model: RETRO in evaluation mode.
        tokenizer: the model's.
        doc_ids: the documents' ids; neighbors never come from a window's own document.
        retrievers: by condition, "on" first; none for the decoder alone.
        seed: of the shuffled neighbors; None without that condition.
    """

    def __init__(
        self,
        model: RetroForCausalLM,
        tokenizer: BulkTokenizer,
        doc_ids: list[str],
        retrievers: dict[str, MilvusRetriever],
        seed: int | None,
    ) -> None:
        self.model, self.doc_ids, self.seed = model, doc_ids, seed
        self.collators = {
            name: RetroDataCollator(retriever, model.config.retrieval_stride) for name, retriever in retrievers.items()
        }
        self.bytes = byte_lengths(tokenizer.hf_tokenizer)
        shuffles = ON in self.collators and seed is not None
        self.conditions = [OFF, *self.collators, *([SHUFFLED] if shuffles else [])]

    @torch.no_grad()
    def measure(self, windows: list[Window]) -> Arrays:
        """Return what was measured of n windows.

        Returns:
            nats (n, conditions), sizes (n, 2) and document (n,); with a knowledge base also
            has_neighbors (n,), True where any were found.
        """
        size = self.model.config.chunk_size
        features = [
            {
                "input_ids": window.tokens,
                "labels": [IGNORED_LABEL] * window.first + window.tokens[window.first :],
                "doc_ids": [[self.doc_ids[window.document]]] * -(-len(window.tokens) // size),
            }
            for window in windows
        ]
        batch = RetroDataCollator()(features)
        labels = batch.pop("labels")[:, 1:]
        predicted = labels != IGNORED_LABEL
        sizes = [predicted.sum(1), (self.bytes[labels.clamp(min=0)] * predicted).sum(1)]
        conditions: dict[str, dict[str, Any]] = {OFF: {"use_retrieval": False}}
        for name, collator in self.collators.items():
            with_neighbors = collator(features)
            conditions[name] = {field: with_neighbors[field] for field in NEIGHBOR_FIELDS}
        if SHUFFLED in self.conditions:
            assert self.seed is not None, "it is given with that condition"
            conditions[SHUFFLED] = shuffle_neighbors(conditions[ON], self.seed)
        nats = [self._nats(batch | conditions[name], labels) for name in self.conditions]
        document = np.array([window.document for window in windows])
        measured = {"nats": torch.stack(nats, 1).numpy(), "sizes": torch.stack(sizes, 1).numpy(), "document": document}
        if ON in conditions:
            measured["has_neighbors"] = conditions[ON]["neighbor_attention_mask"].flatten(1).any(1).numpy()
        return measured

    def _nats(self, arguments: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """Return the nats (n,) of the labels that are predicted."""
        device = self.model.device
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        logits = self.model(**moved, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.transpose(1, 2), labels.to(device), reduction="none").double().sum(1).cpu()


def measure(
    settings: PerplexitySettings,
    opened: Opened,
    documents: list[Document],
    kept: Kept,
    second: MilvusRetriever | None = None,
) -> Measured:
    """Measure documents under all conditions.

    Args:
        settings: the windows.
        opened: the model and its knowledge base.
        documents: the documents.
        kept: the folder of finished parts.
        second: the second knowledge base, if there is one.

    Raises:
        ValueError: no document has two tokens, or more than a chunk if there is a knowledge base;
            no neighbors are found; or the window is longer than the model's positions.
    """
    positions = opened.model.config.n_positions
    if settings.window > positions:
        raise ValueError(
            f"window is {settings.window}, but the model has {positions} positions. Set a smaller --window."
        )
    assert settings.window_stride is not None, "__post_init__ sets it"
    begin = [] if opened.tokenizer.bos_token_id is None else [opened.tokenizer.bos_token_id]
    encoded = opened.tokenizer.encode_batch([document.text for document in documents])
    windows = [
        window
        for number, tokens in enumerate(encoded)
        for window in overlapping_windows(number, begin + tokens, settings.window, settings.window_stride)
    ]
    if not windows:
        raise ValueError(f"There is nothing to predict: {len(documents)} documents have fewer than two tokens each.")
    size, longest = opened.model.config.chunk_size, max(len(window.tokens) for window in windows)
    if opened.retriever is not None and longest <= size:
        raise ValueError(
            f"The longest text or window has {longest} tokens, but neighbors are found for a chunk of {size} and "
            "predict what follows it. Give longer texts and a longer --window, or leave out knowledge_base."
        )
    # batches mix documents, so that shuffled neighbors are those of another one
    order = np.random.default_rng(settings.seed).permutation(len(windows))
    retrievers = {} if opened.retriever is None else {ON: opened.retriever}
    if second is not None:
        retrievers[OTHER] = second
    doc_ids = [document.id for document in documents]
    seed = settings.seed if len(windows) > 1 else None  # a single window has no other one's neighbors
    measurement = WindowMeasurement(opened.model, opened.tokenizer, doc_ids, retrievers, seed)
    part = settings.batch_size * BATCHES_KEPT
    while len(windows) > 1 and len(windows) % part == 1:  # nor has one that is left over
        part += 1

    def measure_part(rows: range) -> Arrays:
        batches = np.array_split(order[rows.start : rows.stop], max(1, len(rows) // settings.batch_size))
        done = [measurement.measure([windows[place] for place in batch]) for batch in batches]
        return {name: np.concatenate([part[name] for part in done]) for name in done[0]}

    parts = kept.parts("perplexity", len(windows), part, measure_part)
    if opened.retriever is not None and not parts["has_neighbors"].any():
        raise ValueError(
            "No neighbors were found for any chunk: the knowledge base holds only the measured documents themselves, "
            "or nothing that the search matches. Ingest other documents."
        )
    places = np.unique(parts["document"], return_inverse=True)[1]
    nats, sizes = (np.zeros((places.max() + 1, parts[name].shape[1])) for name in ("nats", "sizes"))
    np.add.at(nats, places, parts["nats"])
    np.add.at(sizes, places, parts["sizes"])
    return Measured(nats, sizes, measurement.conditions)


def open_second(settings: PerplexitySettings, opened: Opened) -> MilvusRetriever:
    """Open the second knowledge base.

    Raises:
        KnowledgeBaseError, ValueError: it cannot be opened, or is not this model's.
    """
    assert opened.retriever is not None, "the settings are checked"
    config = opened.model.config
    retriever = MilvusRetriever.from_uri(
        settings.second_knowledge_base,
        settings.second_collection_name or opened.retriever.collection_name,
        tokenizer=opened.tokenizer,
        embedding_model=settings.embedding_model,
        num_neighbors=opened.retriever.num_neighbors,
        neighbor_length=opened.retriever.neighbor_length,
    )
    if retriever.chunk_size != config.chunk_size:
        retriever.close()
        raise ValueError(
            f"{settings.second_knowledge_base} has chunks of {retriever.chunk_size} tokens, but the model reads chunks "
            f"of {config.chunk_size}. Ingest the texts with the model's chunk size."
        )
    return retriever


def write_report(settings: PerplexitySettings, measured: Measured) -> None:
    """Write perplexity.json, perplexity.md and the plot, and print the table."""
    report = Report(Path(settings.output_dir), "perplexity", f"Perplexity of {settings.name}")
    tokens, text_bytes = (int(total) for total in measured.sizes.sum(0))
    report.text(
        f"{len(measured.sizes)} documents, {tokens:,} tokens, {text_bytes:,} bytes; windows of {settings.window} "
        f"tokens, {settings.window_stride} apart. Gains are in bits per byte, with 95 % intervals over documents."
    )
    scores = {condition: measured.of(condition) for condition in measured.conditions}
    gains = {condition: measured.gain(condition, OFF) for condition in measured.conditions if condition != OFF}
    rows = [
        [name, *(f"{score[key]:.4f}" for key in ("loss", "perplexity", "bits_per_byte")), str(gains.get(name, ""))]
        for name, score in scores.items()
    ]
    report.table(["neighbors", "loss", "perplexity", "bits per byte", f"gain over {OFF}"], rows)
    over = {other: measured.gain(ON, other) for other in (SHUFFLED, OTHER) if ON in gains and other in gains}
    for other, value in over.items():
        report.text(f"With its own neighbors the model saves {value} bits per byte over: {other}.")
    report.numbers({"conditions": scores, "gain_over_off": gains, "gain_of_on_over": over})
    report.numbers({"documents": len(measured.sizes), "tokens": tokens, "bytes": text_bytes})
    report.numbers({"window": settings.window, "window_stride": settings.window_stride})
    report.plot("bits_per_byte", lambda axes: draw_bars(axes, scores, gains))
    report.save()


def draw_bars(axes: Any, scores: dict[str, dict[str, float]], gains: dict[str, Gain]) -> None:
    """Draw the bits per byte of each condition, with the interval of its difference from off."""
    names, heights = list(scores), [score["bits_per_byte"] for score in scores.values()]
    axes.bar(names, heights, color="#4c72b0", width=0.6)
    for place, name in enumerate(names):
        if name in gains:
            low, high = (heights[0] - bound for bound in (gains[name].high, gains[name].low))
            axes.vlines(place, low, high, color="black")
    axes.set_ylabel("bits per byte (lower is better)")


def run(settings: PerplexitySettings) -> None:
    """Measure, and write the report."""
    documents = settings.read()
    opened = open_model(settings, needs_neighbors=settings.knowledge_base is not None)
    second = None
    try:
        if settings.second_knowledge_base is not None:
            second = open_second(settings, opened)
        content = hashlib.sha256("\0".join(f"{document.id}\0{document.text}" for document in documents).encode())
        of = opened.describe() | {
            "text": content.hexdigest()[:16],
            "window": settings.window,
            "window_stride": settings.window_stride,
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "second knowledge base": None if second is None else describe_retriever(second),
        }
        measured = measure(settings, opened, documents, Kept(Path(settings.output_dir) / "parts", of), second)
    finally:
        if second is not None:
            second.close()
        opened.close()
    write_report(settings, measured)
