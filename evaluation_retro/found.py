"""The neighbors of windows, found once and then measured in several ways."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from modeling_retro.neighbor_fetching import Retriever
from modeling_retro.neighbor_inputs import NeighborInputs
from modeling_retro.retrieval_points import retrieval_points
from retrieval import MilvusRetriever

from .bits_per_byte import shuffle_neighbors
from .kept import Kept
from .windows import Windows

FIELDS = ("ids", "mask", "scores", "doc_ids", "chunk_indices")
ONE_WINDOW = (
    "Shuffled neighbors come from another window, but there is only one: one document is as long as a window. Give "
    "more texts, or a smaller --window."
)
WINDOWS = 16  # whose neighbors are searched for at once


@dataclass
class Found:
    """The neighbors of N windows at their C retrieval points, the best one first.

    Attributes:
        ids: (N, C, k, r) int64.
        mask: (N, C, k, r) bool, False for padding and for neighbors that are not there.
        scores: (N, C, k) float32, 0 for a neighbor that is not there.
        doc_ids: (N, C, k) text, "" for a neighbor that is not there.
        chunk_indices: (N, C, k) int64, the chunk's number in its document.
        stride: tokens between two points. The first lies after a chunk.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    scores: torch.Tensor
    doc_ids: np.ndarray
    chunk_indices: np.ndarray
    stride: int

    @property
    def inputs(self) -> NeighborInputs:
        """The neighbors as the model takes them."""
        return NeighborInputs(self.ids, self.mask, self.scores)

    def rows(self, rows: slice) -> "Found":
        """Return the neighbors of some windows."""
        return self._take(lambda array: array[rows])

    def best(self, k: int) -> "Found":
        """Return the k best neighbors of each point.

        Raises:
            ValueError: fewer were found.
        """
        if k > self.ids.shape[2]:
            raise ValueError(f"{k} neighbors are asked for, but {self.ids.shape[2]} were found for each point.")
        return self._take(lambda array: array[:, :, :k])

    def shuffled(self, seed: int = 0) -> "Found":
        """Give every point the neighbors of a point in another window.

        Raises:
            ValueError: there is only one window.
        """
        if len(self.ids) < 2:
            raise ValueError(ONE_WINDOW)
        places = np.arange(self.doc_ids.size).reshape(self.doc_ids.shape)
        moved = shuffle_neighbors(
            {
                "neighbor_attention_mask": self.mask,
                "ids": self.ids,
                "scores": self.scores,
                "places": torch.from_numpy(places),
            },
            seed,
        )
        order = moved["places"].numpy()
        return replace(
            self,
            ids=moved["ids"],
            mask=moved["neighbor_attention_mask"],
            scores=moved["scores"],
            doc_ids=self.doc_ids.reshape(-1)[order],
            chunk_indices=self.chunk_indices.reshape(-1)[order],
        )

    def without_continuation(self, chunk_size: int) -> "Found":
        """Return the neighbors without the text that follows each one's chunk."""
        return replace(self, mask=self.mask & (torch.arange(self.mask.shape[-1]) < chunk_size))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fields as arrays, to be kept."""
        return {name: np.asarray(getattr(self, name)) for name in FIELDS}

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], stride: int) -> "Found":
        """Build from kept arrays."""
        ids, mask, scores = (torch.from_numpy(arrays[name]) for name in ("ids", "mask", "scores"))
        return cls(ids, mask, scores, arrays["doc_ids"], arrays["chunk_indices"], stride)

    def _take(self, part: Callable) -> "Found":
        return replace(self, **{name: part(getattr(self, name)) for name in FIELDS})


def find(retriever: Retriever, windows: Windows, stride: int | None = None) -> Found:
    """Find the neighbors of all points of each window.

    The query of a point is the chunk before it. A window's own document is left out.

    Args:
        retriever: finds `retriever.num_neighbors` for each point.
        windows: N windows of T tokens.
        stride: tokens between two points. Default: a chunk.

    Raises:
        ValueError: the windows have no point that predicts a token, or no neighbor was found.
    """
    size, length = retriever.chunk_size, windows.tokens.shape[1]
    stride = stride or size
    points = retrieval_points(length - 1, size, stride)
    if not points:
        raise ValueError(
            f"A window has {length} tokens, but neighbors are found for a chunk of {size} and predict what follows it. "
            f"Set --window to {size + 1} or more."
        )
    parts = list(_search(retriever, windows, points))
    shape = (len(windows), len(points))
    ids, mask, scores, indices = (
        torch.cat([getattr(part, name) for part in parts]).unflatten(0, shape)
        for name in ("ids", "attention_mask", "scores", "chunk_indices")
    )
    if not mask.any():
        raise ValueError(
            f"No neighbors were found for any of {len(windows) * len(points)} chunks: the knowledge base holds only "
            "the measured documents themselves, or nothing that the search matches. Ingest other documents."
        )
    doc_ids = np.array([[doc_id or "" for doc_id in row] for part in parts for row in part.doc_ids])
    return Found(ids, mask.bool(), scores.nan_to_num(0.0), doc_ids.reshape(*shape, -1), np.asarray(indices), stride)


def kept_find(kept: Kept, name: str, retriever: MilvusRetriever, windows: Windows, stride: int | None = None) -> Found:
    """Return what [`find`] returns, from the folder if it was found before.

    Args:
        kept: the folder.
        name: of the windows, such as "held_out".
    """
    stride = stride or retriever.chunk_size
    key = f"neighbors_{name}_{retriever.search}_{stride}_{retriever.num_neighbors}"
    return Found.of(kept.arrays(key, lambda: find(retriever, windows, stride).arrays()), stride)


def _search(retriever: Retriever, windows: Windows, points: range) -> Iterator:
    """Yield the neighbors of a few windows at a time."""
    size = retriever.chunk_size
    for start in tqdm(range(0, len(windows), WINDOWS), desc="Searching", leave=False):
        rows = slice(start, start + WINDOWS)
        queries = [tokens[point - size : point] for tokens in windows.tokens[rows].tolist() for point in points]
        own = [frozenset([doc_id]) for doc_id in windows.doc_ids[rows] for _ in points]
        yield retriever.retrieve(queries, exclude_doc_ids=own)
