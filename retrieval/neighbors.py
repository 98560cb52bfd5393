"""Neighbors: what a search hands to a model, as one small dataclass of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .connection import Row


@dataclass
class Neighbors:
    """The k neighbors of each of n chunks, r tokens each.

    Attributes:
        ids: (n, k, r) int64; the neighbor chunk's tokens, its continuation, then 0 as padding.
        attention_mask: (n, k, r) bool; False for padding and for missing neighbors.
        doc_ids: n lists of k document ids, None for a missing neighbor.
        chunk_indices: (n, k) int64, the chunk's number in its document, -1 for a missing neighbor.
        scores: (n, k) float32, nan for a missing neighbor: the cosine similarity, or for search by
            words a number in [0, 1), see [`retrieval.searches.bounded`].
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    doc_ids: list[list[str | None]]
    chunk_indices: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def of(cls, found: Sequence[Sequence[Row]], k: int, r: int) -> "Neighbors":
        """Return the rows that were found for each chunk, at most k, as tensors."""
        n = len(found)
        ids, mask = np.zeros((n, k, r), dtype=np.int64), np.zeros((n, k, r), dtype=bool)
        indices, scores = np.full((n, k), -1), np.full((n, k), np.nan, dtype=np.float32)
        doc_ids: list[list[str | None]] = [[None] * k for _ in found]
        for chunk, rows in enumerate(found):
            for place, row in enumerate(rows):
                tokens = [*row["tokens"], *row["continuation"]][:r]
                ids[chunk, place, : len(tokens)] = tokens
                mask[chunk, place, : len(tokens)] = True
                doc_ids[chunk][place] = row["doc_id"]
                indices[chunk, place], scores[chunk, place] = row["chunk_index"], row["score"]
        return cls(
            torch.from_numpy(ids), torch.from_numpy(mask), doc_ids, torch.from_numpy(indices), torch.from_numpy(scores)
        )
