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
from .decoder_states import read_sequences, store_batch
from .in_context import Prompt, in_context_nats, in_context_prompts
from .replug import replug_nats
from .retro_in_context import retro_in_context_nats

__all__ = [
    "CONDITIONS",
    "Evaluation",
    "Prompt",
    "best_weight",
    "byte_lengths",
    "evaluate",
    "in_context_nats",
    "in_context_prompts",
    "paired_gain",
    "read_sequences",
    "replug_nats",
    "retro_in_context_nats",
    "sequence_nats",
    "shuffle_neighbors",
    "store_batch",
    "weight_nats",
]
