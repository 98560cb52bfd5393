"""Give sequences another sequence's neighbors, to train with and to measure with."""

import numpy as np

FIELDS = ("ids", "mask", "scores")
TRAINED_SHARE = 0.2  # of the chunks, as in training_retro


def shuffle_share(arrays: dict[str, np.ndarray], part: str, share: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the arrays with a share of a part's chunks reading another sequence's neighbors.

    A neighbor keeps the score with which it was found for the other sequence.

    Args:
        arrays: ids, mask and scores (N, C, k, …), by part and name.
        seed: chooses the chunks, and how far the sequences are rotated.
    """
    rng = np.random.default_rng(seed)
    count, chunks = arrays[f"{part}_ids"].shape[:2]
    is_shuffled = rng.random((count, chunks)) < share
    shift = int(rng.integers(1, count))
    shuffled = dict(arrays)
    for name in FIELDS:
        array = arrays[f"{part}_{name}"]
        chosen = is_shuffled.reshape(count, chunks, *(1,) * (array.ndim - 2))
        shuffled[f"{part}_{name}"] = np.where(chosen, np.roll(array, shift, 0), array)
    return shuffled
