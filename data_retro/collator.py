"""RetroDataCollator: packed sequences → a batch of tensors, with the neighbors of every chunk."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from retrieval import MilvusRetriever


# What a chunk's neighbors are handed on as: (…, k, r) twice, (…, k).
NEIGHBOR_FIELDS = {
    "neighbor_ids": torch.long,
    "neighbor_attention_mask": torch.bool,
    "neighbor_scores": torch.float32,
}


@dataclass
class RetroDataCollator:
    """Collate what [`data_retro.packing.pack`] yields, fetching the neighbors of all chunks in one search.

    A chunk never reads a document that is still to come in its sequence: excluded are the documents that the chunk
    touches and those of all later chunks. The latter matter because what a chunk reads reaches every later position; a
    neighbor from the next document could simply be the text that the model is asked to predict.

    Args:
        retriever: an object with `retrieve`, `chunk_size`, `num_neighbors` and `neighbor_length`, such as
            [`MilvusRetriever`]. Not asked for sequences that come with their neighbors (see `neighbors_of`); None gives plain
            language-model batches for those that do not.
    """

    retriever: "MilvusRetriever | None" = None

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """Make a batch of sequences.

        Args:
            features: B sequences, each {"input_ids": ints, "doc_ids": for each chunk a list of document ids}. Lists, arrays and
                tensors will do. Further columns that are read if they are there: "labels" (default: the tokens),
                "attention_mask" (tokens with 0 are padding and are left out), and the neighbors of `neighbors_of`.

        Returns:
            input_ids (B, T): padded on the right with 0 to the longest sequence.
            labels (B, T): the same tokens or the labels given, -100 where there is padding; the model shifts them.
            attention_mask (B, T): only when there is padding.
            neighbor_ids (B, C, k, r), neighbor_attention_mask (B, C, k, r), neighbor_scores (B, C, k): with a retriever. Slot
                j of a row is its j-th complete chunk, C the most that a row has and at least 1; slots without a chunk are
                masked out.

        Raises:
            ValueError: a column that is needed is not there, or has another length than its sequence; says what to do.
        """
        rows = [_content(feature) for feature in features]
        lengths = torch.tensor([len(tokens) for tokens, _ in rows])
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad([torch.tensor(tokens, dtype=torch.long) for tokens, _ in rows], batch_first=True)
        labels = [torch.tensor(labels, dtype=torch.long) for _, labels in rows]
        batch = {"input_ids": input_ids, "labels": pad(labels, batch_first=True, padding_value=-100)}
        attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        if not attention_mask.all():
            batch["attention_mask"] = attention_mask.long()
        if "neighbor_ids" in features[0]:
            batch |= _stack_neighbors(features)
        elif self.retriever is not None:
            batch |= _stack_neighbors(self.neighbors_of(features))
        return batch

    def neighbors_of(self, features: list[dict]) -> list[dict]:
        """Fetch the neighbors of each sequence's complete chunks, in one search.

        Returns:
            for each sequence {"neighbor_ids": (chunks, k, r), "neighbor_attention_mask": (chunks, k, r) bool,
            "neighbor_scores": (chunks, k) float32, cosine similarity, 0 where there is no neighbor}. A sequence without a
            complete chunk has one slot, masked out: what reads neighbors then has its gradients, of zero, in every batch.

        Raises:
            ValueError: a sequence does not say which documents its chunks come from.
        """
        size = self.retriever.chunk_size
        rows = [_content(feature)[0] for feature in features]
        counts = [len(tokens) // size for tokens in rows]
        places = [(tokens, chunk) for tokens, count in zip(rows, counts, strict=True) for chunk in range(count)]
        exclude = [
            still_to_come
            for feature, count in zip(features, counts, strict=True)
            for still_to_come in _documents_from_chunk_on(_documents_of(feature, count))[:count]
        ]
        shape = (1, self.retriever.num_neighbors, self.retriever.neighbor_length)
        none = {
            name: torch.zeros(shape, dtype=dtype)
            for (name, dtype), shape in zip(NEIGHBOR_FIELDS.items(), (shape, shape, shape[:2]), strict=True)
        }
        if not places:
            return [none] * len(features)
        chunks = torch.tensor([tokens[chunk * size : (chunk + 1) * size] for tokens, chunk in places])
        following = {}
        if getattr(self.retriever, "max_leakage", None) is not None:
            following["continuations"] = [tokens[(chunk + 1) * size : (chunk + 2) * size] for tokens, chunk in places]
        found = self.retriever.retrieve(chunks, exclude_doc_ids=exclude, **following)
        parts = (part.split(counts) for part in (found.ids, found.attention_mask, found.scores.nan_to_num(0.0)))
        fetched = zip(counts, zip(*parts, strict=True), strict=True)
        return [dict(zip(NEIGHBOR_FIELDS, row, strict=True)) if count else none for count, row in fetched]


def _content(feature: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the tokens and labels of a sequence, without its padding.

    Raises:
        ValueError: it has no tokens, or labels or an attention mask of another length.
    """
    if "input_ids" not in feature:
        raise ValueError(
            f"A sequence has no input_ids, only {sorted(feature)}: tokenize and pack the text first (data_retro.packing.pack)."
        )
    tokens = _ints(feature["input_ids"])
    labels = _ints(feature.get("labels", tokens))
    is_real = _ints(feature.get("attention_mask", [1] * len(tokens)))
    for name, values in (("labels", labels), ("attention_mask", is_real)):
        if len(values) != len(tokens):
            raise ValueError(
                f"A sequence of {len(tokens)} tokens has {len(values)} values in {name}: give one a token."
            )
    return list(compress(tokens, is_real)), list(compress(labels, is_real))


def _ints(values: Any) -> list[int]:
    """Return a list of what a list, an array or a tensor holds."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _documents_of(feature: Mapping[str, Any], count: int) -> list[list[str]]:
    """Return the ids of the documents that each chunk of a sequence touches.

    Raises:
        ValueError: they are missing, for all chunks or for some.
    """
    if "doc_ids" not in feature:
        raise ValueError(
            f"A sequence has no doc_ids, only {sorted(feature)}: without them its chunks could read the very text that is to be "
            "predicted. If the dataset has the column, the trainer removed it: set remove_unused_columns=False. Otherwise give "
            "for each chunk the ids of the documents that it comes from, as data_retro.packing.pack does, or [] for text that is "
            "not in the knowledge base."
        )
    if len(feature["doc_ids"]) < count:
        raise ValueError(
            f"A sequence of {count} chunks has doc_ids for {len(feature['doc_ids'])}: give one list of document ids a chunk."
        )
    return feature["doc_ids"]


def _stack_neighbors(features: list[dict]) -> dict[str, torch.Tensor]:
    """(B, C, …) each, C the most chunks of a row; the slots of a row with fewer are masked out."""
    stacked = {}
    for name, dtype in NEIGHBOR_FIELDS.items():
        rows = [torch.as_tensor(feature[name], dtype=dtype) for feature in features]
        stacked[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return stacked


def _documents_from_chunk_on(doc_ids: list[list[str]]) -> list[frozenset[str]]:
    """For each chunk of a sequence, the documents that it or a later chunk touches."""
    documents: list[frozenset[str]] = []
    for touched in reversed(doc_ids):
        documents.append(frozenset(touched) | (documents[-1] if documents else frozenset()))
    return documents[::-1]
