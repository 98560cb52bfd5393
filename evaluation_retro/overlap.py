"""Measure how much text the predicted chunks share with their neighbors.

A text that stands in the knowledge base, too, can be copied. So Borgeaud et al. 2022 (section 2.6)
measure what retrieval gains by the longest run of tokens that a chunk shares with its neighbors;
Norlund et al. 2023 ("On the Generalization Ability of Retrieval-Enhanced Transformers") find that
most of the gain comes from such chunks.
"""

import numpy as np
import torch

from modeling_retro.retrieval_points import retrieval_points

from .found import Found

NOTHING_THERE, NOTHING_HERE = -1, -2  # padding of neighbors and of texts; it equals no token
WINDOWS = 32  # compared at once


def longest_shared_run(texts: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the length (B,) of the longest run of tokens that each text shares with the other.

    Args:
        texts: (B, L) tokens.
        others: (B, R) tokens. Padding of texts and of others has negative numbers that differ.
    """
    longest = np.zeros(len(texts), dtype=np.int64)
    runs = np.zeros(others.shape, dtype=np.int64)  # that end at each place of others and at this token
    for token in texts.T:
        before = np.pad(runs[:, :-1], ((0, 0), (1, 0)))
        runs = np.where(others == token[:, None], before + 1, 0)
        longest = np.maximum(longest, runs.max(1))
    return longest


def shared_runs(tokens: torch.Tensor, found: Found, chunk_size: int, with_query: bool) -> np.ndarray:
    """Return the longest run (N, C) that each predicted chunk shares with any of its neighbors.

    The chunk that a point predicts has the tokens up to the next point, or to the window's end. A
    neighbor's text is its chunk and what follows it.

    Args:
        tokens: (N, T), the windows.
        found: their neighbors at C points.
        chunk_size: the model's.
        with_query: compare the query and the predicted chunk as one text, as in the paper; else the
            predicted chunk alone.
    """
    length = tokens.shape[1]
    points = retrieval_points(length - 1, chunk_size, found.stride)
    padded = np.pad(tokens.numpy(), ((0, 0), (0, found.stride)), constant_values=NOTHING_HERE)
    before = chunk_size if with_query else 0
    texts = np.stack([padded[:, point - before : point + found.stride] for point in points], 1)
    others = np.where(found.mask.numpy(), found.ids.numpy(), NOTHING_THERE)
    k = others.shape[2]
    longest = []
    for start in range(0, len(texts), WINDOWS):
        rows = slice(start, start + WINDOWS)
        repeated = np.repeat(texts[rows], k, axis=1).reshape(-1, texts.shape[2])
        runs = longest_shared_run(repeated, others[rows].reshape(-1, others.shape[3]))
        longest.append(runs.reshape(-1, len(points), k).max(2))
    return np.concatenate(longest)
