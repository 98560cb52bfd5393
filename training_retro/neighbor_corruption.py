"""Neighbor corruption: some chunks train with another sequence's neighbors, some sequences without neighbors."""

from typing import Any

import torch

from configuration_retro import RetroConfig
from data_retro.collator import NEIGHBOR_FIELDS
from evaluation_retro import shuffle_neighbors

from .arguments import RetroTrainingArguments

BAD_NEIGHBORS = 0.2  # share of chunks that a copy head sees with another sequence's neighbors


def share_shuffled(args: RetroTrainingArguments, config: RetroConfig) -> float:
    """Share of chunks trained with another sequence's neighbors: `neighbor_shuffle`, or its default."""
    if args.neighbor_shuffle is None:
        return BAD_NEIGHBORS if config.copy_head else 0.0
    return args.neighbor_shuffle


def check_batch_size(args: RetroTrainingArguments, config: RetroConfig) -> None:
    """Raises ValueError where a batch of one sequence is to hold another one's neighbors."""
    if share_shuffled(args, config) and args.per_device_train_batch_size < 2:
        raise ValueError(
            "per_device_train_batch_size is 1: bad neighbors (neighbor_shuffle, a fifth with a copy head) come from another "
            "sequence of the batch. Set it to 2 or more, or neighbor_shuffle to 0."
        )


def corrupt_neighbors(inputs: dict[str, Any], args: RetroTrainingArguments, config: RetroConfig) -> dict[str, Any]:
    """Return the batch with some of its neighbors shuffled and some dropped, as the settings say."""
    mask = inputs.get("neighbor_attention_mask")
    share = share_shuffled(args, config)
    if mask is not None and share and len(mask) > 1:
        neighbors = {name: inputs[name] for name in NEIGHBOR_FIELDS if name in inputs}
        others = shuffle_neighbors(neighbors, seed=int(torch.randint(2**31, ())))
        bad = (torch.rand(mask.shape[:2]) < share).to(mask.device)
        inputs = inputs | {
            name: torch.where(bad.view(*bad.shape, *[1] * (own.ndim - 2)), others[name], own)
            for name, own in neighbors.items()
        }
        mask = inputs["neighbor_attention_mask"]
    if mask is not None and args.neighbor_dropout:
        kept = torch.rand(len(mask)) >= args.neighbor_dropout
        inputs = inputs | {"neighbor_attention_mask": mask & kept.to(mask.device)[:, None, None, None]}
    return inputs
