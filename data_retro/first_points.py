"""First points: give each sequence a first retrieval point of its own, the same in every epoch.

The knowledge base is searched after `first_point` tokens, then after every stride more. The paper's
grid begins after a whole chunk. A model that is asked short questions should also see earlier
points in training.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def check_first_point(first_point: int, chunk_size: int, stride: int) -> None:
    """Raise ValueError if a first point is outside its range."""
    if not 1 <= first_point < chunk_size + stride:
        raise ValueError(
            f"A sequence has first_point {first_point}. Give a number from 1 to chunk_size + retrieval_stride - 1 "
            f"({chunk_size + stride - 1})."
        )


@dataclass(frozen=True)
class FirstPoints:
    """Draws the first point of each sequence from a seed and the sequence's tokens.

    All first points from 1 to chunk_size + stride - 1 are equally likely. So about half of the
    sequences begin with a query shorter than a chunk, and on average a sequence's first point is
    the paper's.

    Attributes:
        seed: other seeds give other points.
        chunk_size: m, the tokens of a whole query.
        stride: s, the tokens between two points.
    """

    seed: int
    chunk_size: int
    stride: int

    def of(self, tokens: Sequence[int]) -> int:
        """Return the first point of a sequence; it is the same in every process and version."""
        digest = hashlib.sha256(f"{self.seed} ".encode() + np.asarray(tokens, dtype="<i8").tobytes()).digest()
        return 1 + int.from_bytes(digest[:8], "big") % (self.chunk_size + self.stride - 1)

    def add_to(self, sequences: Iterable[dict]) -> Iterator[dict]:
        """Yield the sequences with their first points, in a column `first_point`."""
        return (sequence | {"first_point": self.of(sequence["input_ids"])} for sequence in sequences)
