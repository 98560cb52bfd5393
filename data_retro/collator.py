"""RetroDataCollator: packed sequences → a batch of tensors, with the neighbors of every point."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch

from modeling_retro import Retriever
from modeling_retro.retrieval_points import retrieval_points

from .first_points import check_first_point

# The columns of a row's neighbors: ids and mask are (points, k, r), scores are (points, k).
NEIGHBOR_FIELDS = {
    "neighbor_ids": torch.long,
    "neighbor_attention_mask": torch.bool,
    "neighbor_scores": torch.float32,
}
IGNORED_LABEL = -100  # the label of a token that is not predicted, as in transformers


@dataclass
class RetroDataCollator:
    """Collate packed sequences into a batch, and fetch all their neighbors in one search.

    Sequences are as [`data_retro.packing.pack`] yields them. Points lie after
    `first_point` tokens, then after every `retrieval_stride` more. The query of a point is the
    chunk_size tokens before it, or all tokens if they are fewer.

    The neighbors of a point never come from documents with a token in its query or after it. Later
    documents count too: every later position can use what this point reads, so a neighbor from the
    next document could contain the text to predict.

    Args:
        retriever: finds the neighbors, for example a [`retrieval.MilvusRetriever`]. If it has
            `max_leakage`, `retrieve` also gets the `continuations` of the queries. It is not used
            for sequences that bring their neighbors. None: sequences without neighbors become plain
            language-model batches.
        retrieval_stride: tokens between two points; the model's. Default: the retriever's
            chunk_size.

    Raises:
        ValueError: the stride is below 1 or above the chunk size.
    """

    retriever: Retriever | None = None
    retrieval_stride: int | None = None

    def __post_init__(self) -> None:
        size = None if self.retriever is None else self.retriever.chunk_size
        if self.retrieval_stride is None:
            self.retrieval_stride = size
        elif not 1 <= self.retrieval_stride <= (size or self.retrieval_stride):
            raise ValueError(
                f"retrieval_stride is {self.retrieval_stride}. Give a number from 1 to chunk_size ({size})."
            )

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """Make a batch of sequences.

        Args:
            features: B sequences, each {"input_ids": ints, "doc_ids": for each chunk a list of
                document ids}. Lists, arrays and tensors are accepted. Optional columns: "doc_ends"
                (for each of these ids, the number of tokens up to its last one in that chunk;
                default: the chunk's end), "first_point" (default: the chunk size), "labels"
                (default: the tokens), "attention_mask" (tokens with 0 are padding and are left
                out), and the neighbors that [`neighbors_of`] returns.

        Returns:
            input_ids (B, T) int64: padded on the right with 0 to the longest sequence.
            labels (B, T) int64: the tokens or the given labels, -100 for padding; the model shifts
                them.
            attention_mask (B, T) int64: only if there is padding.
            neighbor_ids (B, C, k, r) int64, neighbor_attention_mask (B, C, k, r) bool,
                neighbor_scores (B, C, k) float32: only with neighbors. Slot j of a row is its j-th
                point; C is the largest number of points in a row, at least 1. Slots without a point
                are masked out.
            first_point (B,) int64: only if the sequences have it.

        Raises:
            ValueError: a column is missing in some sequence, its length is not that of its
                sequence, or a first point is out of its range.
        """
        rows = [_content(feature) for feature in features]
        lengths = torch.tensor([len(tokens) for tokens, _ in rows])
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad([torch.tensor(tokens, dtype=torch.long) for tokens, _ in rows], batch_first=True)
        labels = [torch.tensor(labels, dtype=torch.long) for _, labels in rows]
        batch = {"input_ids": input_ids, "labels": pad(labels, batch_first=True, padding_value=IGNORED_LABEL)}
        attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        if not attention_mask.all():
            batch["attention_mask"] = attention_mask.long()
        if with_first_point := sum("first_point" in feature for feature in features):
            if with_first_point < len(features):
                raise ValueError(
                    f"{with_first_point} of {len(features)} sequences in a batch have a first_point. Give all of them "
                    "one, or none."
                )
            batch["first_point"] = torch.tensor([int(feature["first_point"]) for feature in features])
        if "neighbor_ids" in features[0]:
            batch |= _stack_neighbors(features)
        elif self.retriever is not None:
            batch |= _stack_neighbors(self.neighbors_of(features))
        return batch

    def neighbors_of(self, features: list[dict]) -> list[dict]:
        """Fetch the neighbors of each sequence's retrieval points, in one search.

        Returns:
            for each sequence {"neighbor_ids": (points, k, r) int64, "neighbor_attention_mask":
            (points, k, r) bool, "neighbor_scores": (points, k) float32, the similarity, 0 for a
            missing neighbor}. A sequence without a point has one slot, which is masked out. Thus
            all parameters get a gradient in every batch, even if it is zero.

        Raises:
            ValueError: there is no retriever, a sequence does not name the documents of its chunks,
                or its first point is out of its range.
        """
        if self.retriever is None or self.retrieval_stride is None:
            raise ValueError("This collator has no retriever to find neighbors with. Give it one.")
        size = self.retriever.chunk_size
        queries, following, exclude, counts = [], [], [], []
        for feature in features:
            tokens, _ = _content(feature)
            first_point = int(feature.get("first_point", size))
            check_first_point(first_point, size, self.retrieval_stride)
            points = retrieval_points(len(tokens), first_point, self.retrieval_stride)
            ends = _document_ends(feature, size, points[-1] if points else 0)
            for point in points:
                start = max(point - size, 0)
                queries.append(tokens[start:point])
                following.append(tokens[point : point + size])
                exclude.append(frozenset(document for document, end in ends.items() if end > start))
            counts.append(len(points))
        shape = (1, self.retriever.num_neighbors, self.retriever.neighbor_length)
        none = {
            name: torch.zeros(shape, dtype=dtype)
            for (name, dtype), shape in zip(NEIGHBOR_FIELDS.items(), (shape, shape, shape[:2]), strict=True)
        }
        if not queries:
            return [none] * len(features)
        further: dict[str, Any] = {}
        if getattr(self.retriever, "max_leakage", None) is not None:
            further["continuations"] = following
        found = self.retriever.retrieve(queries, exclude_doc_ids=exclude, **further)
        parts = (part.split(counts) for part in (found.ids, found.attention_mask, found.scores.nan_to_num(0.0)))
        fetched = zip(counts, zip(*parts, strict=True), strict=True)
        return [dict(zip(NEIGHBOR_FIELDS, row, strict=True)) if count else none for count, row in fetched]


def _content(feature: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the tokens and labels of a sequence, without its padding.

    Raises:
        ValueError: the sequence has no tokens, or its labels or attention mask have another length.
    """
    if "input_ids" not in feature:
        raise ValueError(
            f"A sequence has no input_ids, only {sorted(feature)}. Tokenize and pack the text first "
            "(data_retro.packing.pack)."
        )
    tokens = _ints(feature["input_ids"])
    labels = _ints(feature.get("labels", tokens))
    is_real = _ints(feature.get("attention_mask", [1] * len(tokens)))
    for name, values in (("labels", labels), ("attention_mask", is_real)):
        if len(values) != len(tokens):
            raise ValueError(
                f"A sequence of {len(tokens)} tokens has {len(values)} values in {name}. Give one value per token."
            )
    return list(compress(tokens, is_real)), list(compress(labels, is_real))


def _ints(values: Any) -> list[int]:
    """Convert a list, an array or a tensor to a list."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _document_ends(feature: Mapping[str, Any], chunk_size: int, last_point: int) -> dict[str, int]:
    """Return for each document of a sequence the number of tokens up to its last one.

    Without `doc_ends` it is rounded up to the end of the chunk, so that never too little is
    excluded.

    Raises:
        ValueError: the ids are missing for some of the chunks up to the last point, or `doc_ends`
            does not go with them.
    """
    if "doc_ids" not in feature:
        raise ValueError(
            f"A sequence has no doc_ids, only {sorted(feature)}, so its neighbors could contain the text to "
            "predict. If the dataset has the column, the trainer removed it: set remove_unused_columns=False. "
            "Otherwise give for each chunk the ids of its documents, as data_retro.packing.pack does, or [] for text "
            "that is not in the knowledge base."
        )
    doc_ids = feature["doc_ids"]
    count = -(-last_point // chunk_size)
    if len(doc_ids) < count:
        raise ValueError(
            f"A sequence of {count} chunks has doc_ids for {len(doc_ids)}. Give one list of document ids per chunk."
        )
    doc_ends = feature.get("doc_ends")
    if doc_ends is None:
        doc_ends = [[(chunk + 1) * chunk_size] * len(ids) for chunk, ids in enumerate(doc_ids)]
    if [*map(len, doc_ends)] != [*map(len, doc_ids)]:
        raise ValueError(
            f"A sequence has doc_ids for chunks of {[*map(len, doc_ids)]} documents and doc_ends for "
            f"{[*map(len, doc_ends)]}. Give one end for each id, or leave doc_ends out."
        )
    ends: dict[str, int] = {}  # a later chunk's end replaces an earlier one's
    for ids, chunk_ends in zip(doc_ids, doc_ends, strict=True):
        ends |= dict(zip(ids, chunk_ends, strict=True))
    return ends


def _stack_neighbors(features: list[dict]) -> dict[str, torch.Tensor]:
    """Stack the neighbors of B rows to (B, C, …), padding with masked slots to the most points."""
    stacked = {}
    for name, dtype in NEIGHBOR_FIELDS.items():
        rows = [torch.as_tensor(feature[name], dtype=dtype) for feature in features]
        stacked[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return stacked
