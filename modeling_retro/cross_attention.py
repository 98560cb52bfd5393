"""Cross-attention with a mask, for every attention implementation of transformers."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, eager_attention_forward

from configuration_retro import RetroConfig


class CrossAttention(GPT2Attention):
    """GPT-2's multi-head attention, with keys and values from other states.

    Shapes: N groups of q queries and t keys, d hidden size.
    """

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__(config, is_cross_attention=True, layer_idx=layer_idx)

    def forward(  # type: ignore[override]  # GPT2Attention's arguments are another module's
        self,
        hidden_states: torch.Tensor,  # (N, q, d)
        others: torch.Tensor,  # (N, t, d)
        mask: Any = None,  # as `cross_attention_mask` makes it. None: all keys may be attended to
    ) -> torch.Tensor:  # (N, q, d)
        """Attend to the other states."""
        if mask is None:
            return super().forward(hidden_states, encoder_hidden_states=others)[0]  # type: ignore[arg-type, return-value]
        keys, values = self.c_attn(others).split(self.split_size, dim=-1)
        output, _ = self.attend(self.q_attn(hidden_states), keys, values, mask)
        return self.resid_dropout(self.c_proj(output))

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended values (N, q, d) and, if there are any, weights (N, heads, q, t).

        Args:
            queries: (N, q, d).
            keys, values: (N, t, d).
            mask: for the attention implementation.
        """
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention_implementation(self.config), eager_attention_forward
        )
        output, weights = attention(
            self,
            self._split_heads(queries),
            self._split_heads(keys),
            self._split_heads(values),
            mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
        )
        return output.flatten(-2), weights

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """Return states (N, tokens, d) as (N, heads, tokens, head_dim)."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def cross_attention_mask(
    config: RetroConfig, hidden_states: torch.Tensor, mask: torch.Tensor, num_queries: int
) -> Any:  # a tensor, or what the attention implementation takes in its place
    """Return the mask (N, t) of N groups of queries for the attention implementation.

    Args:
        hidden_states: only for their type and device.
        mask: bool, False for keys that may not be attended to.
        num_queries: q, the queries of a group.
    """
    mask = open_if_empty(mask)
    if attention_implementation(config) != config._attn_implementation:
        return mask[:, None, None, :]
    # transformers uses only the shape, type and device of these two
    queries = hidden_states.new_empty(mask.shape[0], num_queries, 1)
    keys = hidden_states.new_empty(*mask.shape, 1)
    return create_bidirectional_mask(
        config=config, inputs_embeds=queries, encoder_hidden_states=keys, attention_mask=mask
    )


def attention_implementation(config: RetroConfig) -> str:
    """Return the attention implementation for cross-attention: the model's, or SDPA as a fallback.

    In transformers, flash attention supports padding masks only for self-attention. With
    `cca_match`, the implementation must support a bias on the attention scores.
    """
    implementation = config._attn_implementation
    assert implementation is not None, "set when the model is built"
    if "flash" in implementation or (config.cca_match and implementation != "eager"):
        return "sdpa"
    return implementation


def open_if_empty(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask (…, keys) with the rows that allow no key opened, so that softmax stays finite.

    The results for such rows are never used.
    """
    return mask | ~mask.any(-1, keepdim=True)
