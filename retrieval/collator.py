"""RetroDataCollator: packed sequences → a batch of tensors, with the neighbors of every chunk."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .retriever import MilvusRetriever


@dataclass
class RetroDataCollator:
    """Collate what [`retrieval.packing.pack`] yields, fetching the neighbors of all chunks in one search.

    A chunk never reads a document that is still to come in its sequence: excluded are the documents that the chunk
    touches and those of all later chunks. The latter matter because what a chunk reads reaches every later position; a
    neighbor from the next document could simply be the text that the model is asked to predict.

    Args:
        retriever: an object with `retrieve`, `chunk_size`, `num_neighbors` and `neighbor_length`, such as
            [`MilvusRetriever`]; None gives plain language-model batches.
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
            neighbor_ids (B, C, k, r), neighbor_attention_mask (B, C, k, r): with a retriever. Slot j of a row is its
                j-th complete chunk, C the most that a row has; slots without a chunk are masked out.
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
        if self.retriever is not None:
            batch |= self._neighbors(input_ids, lengths // self.retriever.chunk_size, features)
        return batch

    def _neighbors(self, input_ids: torch.Tensor, complete: torch.Tensor, features: list[dict]) -> dict:
        """Neighbors of each row's first `complete[row]` chunks, in the slots of those chunks."""
        chunk_size = self.retriever.chunk_size
        slots = int(complete.max())
        shape = (len(features), slots, self.retriever.num_neighbors, self.retriever.neighbor_length)
        neighbor_ids = torch.zeros(shape, dtype=torch.long)
        neighbor_attention_mask = torch.zeros(shape, dtype=torch.bool)
        used = torch.arange(slots) < complete[:, None]  # (B, C)
        if slots:
            whole = input_ids[:, : slots * chunk_size]
            chunks = whole.reshape(len(features), slots, chunk_size)[used]  # (n, chunk_size), row after row
            exclude = [
                still_to_come
                for feature, count in zip(features, complete.tolist(), strict=True)
                for still_to_come in _documents_from_chunk_on(feature["doc_ids"])[:count]
            ]
            following = {}
            if getattr(self.retriever, "max_leakage", None) is not None:
                following["continuations"] = [
                    feature["input_ids"][(chunk + 1) * chunk_size : (chunk + 2) * chunk_size]
                    for feature, count in zip(features, complete.tolist(), strict=True)
                    for chunk in range(count)
                ]
            found = self.retriever.retrieve(chunks, exclude_doc_ids=exclude, **following)
            neighbor_ids[used] = found.ids
            neighbor_attention_mask[used] = found.attention_mask
        return {"neighbor_ids": neighbor_ids, "neighbor_attention_mask": neighbor_attention_mask}


def _documents_from_chunk_on(doc_ids: list[list[str]]) -> list[frozenset[str]]:
    """For each chunk of a sequence, the documents that it or a later chunk touches."""
    documents: list[frozenset[str]] = []
    for touched in reversed(doc_ids):
        documents.append(frozenset(touched) | (documents[-1] if documents else frozenset()))
    return documents[::-1]
