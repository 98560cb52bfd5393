"""RetroDataCollator: packed sequences → a batch of tensors, with the neighbors of every chunk."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch

from modeling_retro import Retriever

# The columns of a row's neighbors: ids and mask are (chunks, k, r), scores are (chunks, k).
NEIGHBOR_FIELDS = {
    "neighbor_ids": torch.long,
    "neighbor_attention_mask": torch.bool,
    "neighbor_scores": torch.float32,
}
IGNORED_LABEL = -100  # the label of a token that is not predicted, as in transformers


@dataclass
class RetroDataCollator:
    """Collate packed sequences into a batch, and fetch all their neighbors in one search.

    Sequences are as [`data_retro.packing.pack`] yields them.

    The neighbors of a chunk never come from documents in this chunk or in later chunks of its
    sequence. Later documents count too: every later position can use what this chunk reads, so a
    neighbor from the next document could contain the text to predict.

    Args:
        retriever: finds the neighbors, for example a [`retrieval.MilvusRetriever`]. If it has
            `max_leakage`, `retrieve` also gets the `continuations` of the chunks. It is not used
            for sequences that bring their neighbors. None: sequences without neighbors become plain
            language-model batches.
    """

    retriever: Retriever | None = None

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """Make a batch of sequences.

        Args:
            features: B sequences, each {"input_ids": ints, "doc_ids": for each chunk a list of
                document ids}. Lists, arrays and tensors are accepted. Optional columns: "labels"
                (default: the tokens), "attention_mask" (tokens with 0 are padding and are left
                out), and the neighbors that [`neighbors_of`] returns.

        Returns:
            input_ids (B, T) int64: padded on the right with 0 to the longest sequence.
            labels (B, T) int64: the tokens or the given labels, -100 for padding; the model shifts
                them.
            attention_mask (B, T) int64: only if there is padding.
            neighbor_ids (B, C, k, r) int64, neighbor_attention_mask (B, C, k, r) bool,
                neighbor_scores (B, C, k) float32: only with neighbors. Slot j of a row is its j-th
                complete chunk; C is the largest number of chunks in a row, at least 1. Slots
                without a chunk are masked out.

        Raises:
            ValueError: a column is missing, or its length is not that of its sequence.
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
        if "neighbor_ids" in features[0]:
            batch |= _stack_neighbors(features)
        elif self.retriever is not None:
            batch |= _stack_neighbors(self.neighbors_of(features))
        return batch

    def neighbors_of(self, features: list[dict]) -> list[dict]:
        """Fetch the neighbors of each sequence's complete chunks, in one search.

        Returns:
            for each sequence {"neighbor_ids": (chunks, k, r) int64, "neighbor_attention_mask":
            (chunks, k, r) bool, "neighbor_scores": (chunks, k) float32, the cosine similarity, 0
            for a missing neighbor}. A sequence without a complete chunk has one slot, which is
            masked out. Thus all parameters get a gradient in every batch, even if it is zero.

        Raises:
            ValueError: there is no retriever, or a sequence does not name the documents of its
                chunks.
        """
        if self.retriever is None:
            raise ValueError("This collator has no retriever to find neighbors with. Give it one.")
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
        following: dict[str, Any] = {}
        if getattr(self.retriever, "max_leakage", None) is not None:
            following["continuations"] = [tokens[(chunk + 1) * size : (chunk + 2) * size] for tokens, chunk in places]
        found = self.retriever.retrieve(chunks, exclude_doc_ids=exclude, **following)
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


def _documents_of(feature: Mapping[str, Any], count: int) -> list[list[str]]:
    """Return the ids of the documents in each chunk of a sequence.

    Raises:
        ValueError: the ids are missing for some or all of the `count` complete chunks.
    """
    if "doc_ids" not in feature:
        raise ValueError(
            f"A sequence has no doc_ids, only {sorted(feature)}, so its neighbors could contain the text to "
            "predict. If the dataset has the column, the trainer removed it: set remove_unused_columns=False. "
            "Otherwise give for each chunk the ids of its documents, as data_retro.packing.pack does, or [] for text "
            "that is not in the knowledge base."
        )
    if len(feature["doc_ids"]) < count:
        raise ValueError(
            f"A sequence of {count} chunks has doc_ids for {len(feature['doc_ids'])}. Give one list of document ids "
            "per chunk."
        )
    return feature["doc_ids"]


def _stack_neighbors(features: list[dict]) -> dict[str, torch.Tensor]:
    """Stack the neighbors of B rows to (B, C, …), padding with masked slots to the most chunks."""
    stacked = {}
    for name, dtype in NEIGHBOR_FIELDS.items():
        rows = [torch.as_tensor(feature[name], dtype=dtype) for feature in features]
        stacked[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return stacked


def _documents_from_chunk_on(doc_ids: list[list[str]]) -> list[frozenset[str]]:
    """Return the documents in each chunk and in all later ones."""
    documents: list[frozenset[str]] = []
    for touched in reversed(doc_ids):
        documents.append(frozenset(touched) | (documents[-1] if documents else frozenset()))
    return documents[::-1]
