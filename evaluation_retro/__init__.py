"""Measure how good a RETRO model is and how much of that it owes to its neighbors."""

from .bits_per_byte import (
    CONDITIONS,
    Evaluation,
    byte_lengths,
    evaluate,
    paired_gain,
    sequence_nats,
    shuffle_neighbors,
)
from .copy_baseline import best_weight, weight_nats

__all__ = [
    "CONDITIONS",
    "Evaluation",
    "best_weight",
    "byte_lengths",
    "evaluate",
    "paired_gain",
    "sequence_nats",
    "shuffle_neighbors",
    "weight_nats",
]
