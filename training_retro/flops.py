"""Floating-point operations of a training step, counted from the model's shapes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def step_flops(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Multiplications and additions of forward and backward of one batch, recomputation aside.

    As usual (Kaplan et al., 2020; Chowdhery et al., 2022, appendix B): 2 for each weight of a
    matrix and token in the forward pass, twice that backward (once, for the gradients of the
    inputs, where weights are frozen), and those of attention scores. A mixture's experts count as
    often as tokens are sent to them.
    """
    config: Any = model.config
    rows, length = batch["input_ids"].shape
    width = config.n_embd
    tokens = rows * length
    read = batch["neighbor_ids"].numel() if "neighbor_ids" in batch else 0
    total = 0.0
    for name, size, is_trained in _matrices(model):
        if ".encoder." in name:
            uses = read
        elif ".cca." in name:  # queries and outputs a token, keys and values a neighbor token
            uses = (read if "c_attn" in name else tokens) if read else 0
        else:
            uses = tokens
        total += (6 if is_trained else 4) * size * uses
    # scores and weighted sums: 2 · 2 · width for each pair, three times with the backward pass
    total += 12 * config.n_layer * _heads_width(config) * tokens * length / 2
    total += 12 * config.encoder_num_layers * width * read * config.neighbor_length
    total += (
        12 * len(config.cca_layers) * width * (tokens if read else 0) * config.num_neighbors * config.neighbor_length
    )
    if config.copy_head or config.cca_match:  # cosines of the last tokens with those of the neighbors
        total += (
            6 * config.match_length * width * (tokens if read else 0) * config.num_neighbors * config.neighbor_length
        )
    return total


def _matrices(model: torch.nn.Module) -> Iterator[tuple[str, float, bool]]:
    """Yield name, used weights for each token, and trained or not, of all that multiplies states.

    Looking up an embedding costs nothing. Weights that embeddings share with the output count once.
    """
    config: Any = model.config
    retro: Any = model
    output = retro.get_output_embeddings().weight
    counted: set[int] = set()
    experts = getattr(config.text_config, "num_experts_per_tok", None) or 1
    for place, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{place}.{own_name}"
            if name.endswith(".match") or (isinstance(module, nn.Embedding) and parameter is not output):
                continue
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            # DeepSpeed's ZeRO-3 keeps the parameter itself empty
            shape = getattr(parameter, "ds_shape", parameter.shape)
            size = float(shape.numel())
            if own_name == "weight" and hasattr(module, "in_features"):
                size = module.in_features * module.out_features  # of a quantized matrix, too, whatever its shape
            elif len(shape) == 3:
                size *= min(1.0, experts / shape[0])
            elif len(shape) != 2:
                continue
            yield name, size, parameter.requires_grad


def _heads_width(config: Any) -> int:
    """Return the width of all of the decoder's attention heads together."""
    decoder = config.text_config or config
    heads, head_dim = getattr(decoder, "num_attention_heads", None), getattr(decoder, "head_dim", None)
    return heads * head_dim if heads and head_dim else config.n_embd
