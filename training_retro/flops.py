"""Floating-point operations of a training step, counted from the model's shapes."""

from typing import Any

import torch


def step_flops(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Multiplications and additions of forward and backward of one batch, recomputation aside.

    As usual (Kaplan et al., 2020; Chowdhery et al., 2022, appendix B): 2 for each weight of a
    matrix and token in the forward pass, twice that backward (once, for the gradients of the
    inputs, where weights are frozen), and those of attention scores.
    """
    config: Any = model.config
    rows, length = batch["input_ids"].shape
    width = config.n_embd
    tokens = rows * length
    read = batch["neighbor_ids"].numel() if "neighbor_ids" in batch else 0
    total = 0.0
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed's ZeRO-3 keeps the parameter itself empty
        if len(shape) != 2 or "wpe" in name or "wpos" in name or name.endswith(".match"):
            continue
        if "wte" in name:
            uses = tokens  # as the output projection; looking up costs nothing
        elif ".encoder." in name:
            uses = read
        elif ".cca." in name:  # queries and outputs a token, keys and values a neighbor token
            uses = (read if "c_attn" in name else tokens) if read else 0
        else:
            uses = tokens
        total += (6 if parameter.requires_grad else 4) * shape.numel() * uses
    # scores and weighted sums: 2 · 2 · width for each pair, three times with the backward pass
    total += 12 * config.n_layer * width * tokens * length / 2
    total += 12 * config.encoder_num_layers * width * read * config.neighbor_length
    total += (
        12 * len(config.cca_layers) * width * (tokens if read else 0) * config.num_neighbors * config.neighbor_length
    )
    if config.copy_head or config.cca_match:  # cosines of the last tokens with those of the neighbors
        total += (
            6 * config.match_length * width * (tokens if read else 0) * config.num_neighbors * config.neighbor_length
        )
    return total
