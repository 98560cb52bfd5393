"""Neighbor corruption: some chunks get another sequence's neighbors, some sequences none."""

from typing import Any

import torch

from configuration_retro import RetroConfig
from data_retro.collator import NEIGHBOR_FIELDS
from evaluation_retro import shuffle_neighbors

from .settings import RetroTrainingArguments

COPY_HEAD_SHUFFLE = 0.2  # default of neighbor_shuffle for a model with a copy head
LARGEST_SEED = 2**31


def share_shuffled(args: RetroTrainingArguments, config: RetroConfig) -> float:
    """Return the share of chunks that train with another sequence's neighbors."""
    if args.neighbor_shuffle is None:
        return COPY_HEAD_SHUFFLE if config.copy_head else 0.0
    return args.neighbor_shuffle


def check_batch_size(args: RetroTrainingArguments, config: RetroConfig) -> None:
    """Raise ValueError if neighbors are to be shuffled in batches of one sequence."""
    share = share_shuffled(args, config)
    if share and args.per_device_train_batch_size < 2:
        raise ValueError(
            f"per_device_train_batch_size is 1, but neighbor_shuffle is {share}: these neighbors come from another "
            "sequence of the batch. Set the batch size to 2 or more, or neighbor_shuffle to 0."
        )


def corrupt_neighbors(inputs: dict[str, Any], args: RetroTrainingArguments, config: RetroConfig) -> dict[str, Any]:
    """Return the batch with some chunks' neighbors shuffled and some sequences' masked out.

    Args:
        inputs: a batch; without neighbors it is returned unchanged.
        args: `neighbor_shuffle` and `neighbor_dropout` are the shares.
        config: the model's configuration.
    """
    mask = inputs.get("neighbor_attention_mask")
    share = share_shuffled(args, config)
    if mask is not None and share and len(mask) > 1:
        neighbors = {name: inputs[name] for name in NEIGHBOR_FIELDS if name in inputs}
        others = shuffle_neighbors(neighbors, seed=int(torch.randint(LARGEST_SEED, ())))
        bad = (torch.rand(mask.shape[:2]) < share).to(mask.device)  # (B, C)
        inputs = inputs | {
            name: torch.where(bad.view(*bad.shape, *[1] * (own.ndim - 2)), others[name], own)
            for name, own in neighbors.items()
        }
        mask = inputs["neighbor_attention_mask"]
    if mask is not None and args.neighbor_dropout:
        kept = torch.rand(len(mask)) >= args.neighbor_dropout
        inputs = inputs | {"neighbor_attention_mask": mask & kept.to(mask.device)[:, None, None, None]}
    return inputs
