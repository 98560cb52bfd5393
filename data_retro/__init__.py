"""Training data: documents → mixtures → packed sequences → batches with their neighbors."""

from .collator import NEIGHBOR_FIELDS, RetroDataCollator
from .first_points import FirstPoints
from .mixtures import DocumentStream, mix
from .packing import PackedStream, pack, packed_dataset
from .precomputed import load_precomputed, precompute
from .prefetch import Prefetcher

__all__ = [
    "NEIGHBOR_FIELDS",
    "DocumentStream",
    "FirstPoints",
    "PackedStream",
    "Prefetcher",
    "RetroDataCollator",
    "load_precomputed",
    "mix",
    "pack",
    "packed_dataset",
    "precompute",
]
