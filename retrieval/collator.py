"""RetroDataCollator: packed sequences → a batch of tensors, with the neighbors of every chunk."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .retriever import MilvusRetriever


# What a chunk's neighbors are handed on as: (…, k, r) twice, (…, k).
NEIGHBOR_FIELDS = {
    "neighbor_ids": torch.long,
    "neighbor_attention_mask": torch.bool,
    "neighbor_scores": torch.float32,
}


@dataclass
class RetroDataCollator:
    """Collate what [`retrieval.packing.pack`] yields, fetching the neighbors of all chunks in one search.

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
        """
        Args:
            features: B sequences, each {"input_ids": ints, "doc_ids": for each chunk a list of document ids}.

        Returns:
            input_ids (B, T): padded on the right with 0 to the longest sequence.
            labels (B, T): the same tokens, -100 where there is padding; the model shifts them.
            attention_mask (B, T): only when there is padding.
            neighbor_ids (B, C, k, r), neighbor_attention_mask (B, C, k, r), neighbor_scores (B, C, k): with a retriever. Slot
                j of a row is its j-th complete chunk, C the most that a row has and at least 1; slots without a chunk are
                masked out.
        """
        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        input_ids = torch.nn.utils.rnn.pad_sequence(
            [torch.as_tensor(feature["input_ids"], dtype=torch.long) for feature in features], batch_first=True
        )
        attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        labels = input_ids.masked_fill(~attention_mask, -100)
        batch = {"input_ids": input_ids, "labels": labels}
        if not attention_mask.all():
            batch["attention_mask"] = attention_mask.long()
        if "neighbor_ids" in features[0]:
            batch |= _stack_neighbors(features)
        elif self.retriever is not None:
            batch |= _stack_neighbors(self.neighbors_of(features))
        return batch

    def neighbors_of(self, features: list[dict]) -> list[dict]:
        """The neighbors of each sequence's complete chunks, in one search.

        Returns:
            for each sequence {"neighbor_ids": (chunks, k, r), "neighbor_attention_mask": (chunks, k, r) bool,
            "neighbor_scores": (chunks, k) float32, cosine similarity, 0 where there is no neighbor}. A sequence without a
            complete chunk has one slot, masked out: what reads neighbors then has its gradients, of zero, in every batch.
        """
        size = self.retriever.chunk_size
        counts = [len(feature["input_ids"]) // size for feature in features]
        places = [(feature, chunk) for feature, count in zip(features, counts, strict=True) for chunk in range(count)]
        shape = (1, self.retriever.num_neighbors, self.retriever.neighbor_length)
        none = {
            name: torch.zeros(shape, dtype=dtype)
            for (name, dtype), shape in zip(NEIGHBOR_FIELDS.items(), (shape, shape, shape[:2]), strict=True)
        }
        if not places:
            return [none] * len(features)
        chunks = torch.tensor([feature["input_ids"][chunk * size : (chunk + 1) * size] for feature, chunk in places])
        exclude = [
            still_to_come
            for feature, count in zip(features, counts, strict=True)
            for still_to_come in _documents_from_chunk_on(feature["doc_ids"])[:count]
        ]
        following = {}
        if getattr(self.retriever, "max_leakage", None) is not None:
            following["continuations"] = [
                feature["input_ids"][(chunk + 1) * size : (chunk + 2) * size] for feature, chunk in places
            ]
        found = self.retriever.retrieve(chunks, exclude_doc_ids=exclude, **following)
        parts = (part.split(counts) for part in (found.ids, found.attention_mask, found.scores.nan_to_num(0.0)))
        rows = zip(counts, zip(*parts, strict=True), strict=True)
        return [dict(zip(NEIGHBOR_FIELDS, row, strict=True)) if count else none for count, row in rows]


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
