"""Chunked cross-attention of one decoder layer, behind its attention branch."""

import torch
from torch import nn

from configuration_retro import RetroConfig

from .attention_plan import AttentionPlan
from .cache import RetroCache
from .chunked_cross_attention import ChunkedCrossAttention
from .neighbor_encoder import UnencodedNeighbors
from .norms import make_norm


class ReadsNeighbors(nn.Module):
    """A decoder layer, or a module beside one, that may have chunked cross-attention."""

    def add_cross_attention(self, config: RetroConfig, layer_idx: int) -> None:
        """Create the cross-attention of the layer with this number, and its norm."""
        self.ln_cca = make_norm(config)
        self.cca = ChunkedCrossAttention(config, layer_idx=layer_idx)

    def read_neighbors(
        self,
        hidden_states: torch.Tensor,  # (B, T, d), after the attention branch was added
        encoded: torch.Tensor | None,  # (B, C, k·r, d)
        plan: AttentionPlan | None,
        matches: torch.Tensor | None,  # (n, B·G, w, k·r)
        unencoded: UnencodedNeighbors | None,  # for the first of cca_layers, whose states the encoder attends to
        memory: RetroCache | None,  # for the same layer
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Encode the neighbors in the first of `cca_layers`, and attend to them.

        Returns:
            what to add to the hidden states (B, T, d), None if there is nothing to read; the
            encoded neighbors, for the layers that follow; attention weights (B, heads, T, k·r) if
            the attention implementation returns them.
        """
        states = hidden_states if memory is None else memory.append_query_states(hidden_states)  # (B, L, d)
        if unencoded is not None:
            encoded = unencoded.encode(states)
        if plan is None or not hasattr(self, "cca"):
            return None, encoded, None
        output, weights = self.cca(self.ln_cca(hidden_states), encoded, plan, matches)
        return output, encoded, weights


class CrossAttentionBeside(ReadsNeighbors):
    """The cross-attention of a layer whose own code stays as it is."""

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__()
        self.add_cross_attention(config, layer_idx)

    forward = ReadsNeighbors.read_neighbors
