"""How good a RETRO model is, and how much of that it owes to its neighbors."""

from .bits_per_byte import (
    CONDITIONS,
    Evaluation,
    byte_lengths,
    evaluate,
    paired_gain,
    sequence_nats,
    shuffle_neighbors,
)

__all__ = [
    "CONDITIONS",
    "Evaluation",
    "byte_lengths",
    "evaluate",
    "paired_gain",
    "sequence_nats",
    "shuffle_neighbors",
]
