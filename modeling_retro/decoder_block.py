"""The decoder's block: GPT-2's, with chunked cross-attention in some layers.

Shapes: B rows, T tokens of this call, d hidden size; C points reached in this call, k neighbors of
a point, r tokens of a neighbor; G groups of w queries (see `QueryGroups`); n tokens that are
matched.
"""

from typing import Any

import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from configuration_retro import RetroConfig

from .activation import LeanGELU
from .attention_plan import AttentionPlan
from .cache import RetroCache
from .neighbor_encoder import UnencodedNeighbors
from .reading_layer import ReadsNeighbors


class RetroBlock(GPT2Block, ReadsNeighbors):
    """GPT-2's block; in `cca_layers` with cross-attention between self-attention and MLP."""

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        if config.activation_function == "gelu_new":
            self.mlp.act = LeanGELU()
        if layer_idx in (config.cca_layers or ()):
            self.add_cross_attention(config, layer_idx)

    def forward(  # type: ignore[override]  # GPT2Block has another cross-attention
        self,
        hidden_states: torch.Tensor,  # (B, T, d)
        encoded: torch.Tensor | None = None,  # (B, C, k·r, d)
        plan: AttentionPlan | None = None,
        matches: torch.Tensor | None = None,  # (n, B·G, w, k·r)
        unencoded: UnencodedNeighbors | None = None,  # for the first of cca_layers
        memory: RetroCache | None = None,  # for the same layer
        **kwargs: Any,  # of self-attention
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # hidden_states, encoded
        """Return the next hidden states, and the encoded neighbors for the layers that follow."""
        attn_output, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = attn_output + hidden_states
        read, encoded, _ = self.read_neighbors(hidden_states, encoded, plan, matches, unencoded, memory)
        if read is not None:
            hidden_states = hidden_states + read
        return hidden_states + self.mlp(self.ln_2(hidden_states)), encoded
