"""The longest shared runs equal a comparison of all substrings."""

import numpy as np
import torch

from evaluation_retro.found import Found
from evaluation_retro.overlap import longest_shared_run, shared_runs

CHUNK = 8


def longest(text, other):
    """Try every substring, the longest first."""
    others = {tuple(other[start:end]) for start in range(len(other)) for end in range(start + 1, len(other) + 1)}
    for size in range(len(text), 0, -1):
        if any(tuple(text[start : start + size]) in others for start in range(len(text) - size + 1)):
            return size
    return 0


def test_longest_runs_are_those_of_all_substrings():
    draw = np.random.default_rng(0)
    for vocabulary in (2, 4, 30):
        texts, others = draw.integers(0, vocabulary, (40, 12)), draw.integers(0, vocabulary, (40, 17))
        others[:5, 2:14] = texts[:5]
        expected = [longest(*pair) for pair in zip(texts.tolist(), others.tolist(), strict=True)]
        assert longest_shared_run(texts, others).tolist() == expected
        assert expected[:5] == [12] * 5


def random_found(draw, windows, points, stride, k=3, r=2 * CHUNK):
    mask = np.arange(r) < draw.integers(0, r + 1, (windows, points, k, 1))
    ids = np.where(mask, draw.integers(0, 5, mask.shape), 0)
    shape = (windows, points, k)
    indices = np.zeros(shape, dtype=np.int64)
    doc_ids = np.full(shape, "a")
    return Found(torch.from_numpy(ids), torch.from_numpy(mask), torch.zeros(shape), doc_ids, indices, stride)


def test_chunks_are_compared_with_the_real_tokens_of_their_own_neighbors():
    draw = np.random.default_rng(1)
    for length, stride in ((4 * CHUNK, CHUNK), (3 * CHUNK + 3, CHUNK), (3 * CHUNK, 3)):
        points = range(CHUNK, length, stride)
        windows = 35  # more than are compared at once
        tokens, found = draw.integers(0, 5, (windows, length)), random_found(draw, windows, len(points), stride)
        for before in (0, CHUNK):
            runs = shared_runs(torch.from_numpy(tokens), found, CHUNK, with_query=before > 0)
            assert runs.shape == (windows, len(points))
            for row in range(windows):
                for slot, point in enumerate(points):
                    text = tokens[row, point - before : point + stride].tolist()
                    neighbors = zip(found.ids[row, slot], found.mask[row, slot], strict=True)
                    assert runs[row, slot] == max(longest(text, ids[mask].tolist()) for ids, mask in neighbors)
