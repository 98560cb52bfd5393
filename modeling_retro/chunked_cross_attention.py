"""Chunked cross-attention: each token reads the neighbors of the last chunk that was complete when it was written."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, eager_attention_forward

from configuration_retro import RetroConfig

from .matching import CONTEXT, MATCH_WEIGHTS, SCALE
from .reading import Reading, attention_implementation, remember_chunks

VALUE_SCALE = 4.0  # with cca_match: what is found is learned the sooner the larger it is


class ChunkedCrossAttention(GPT2Attention):
    """CCA of one decoder layer (paper, section 2.4): GPT-2's multi-head cross-attention, one chunk's neighbors a query.

    The output projection starts at zero, so that a model just built on GPT-2 is that GPT-2.

    With `cca_match`, each head adds to its scores, with weights of its own, how well the last tokens match those before each
    place (see `match_context`): what induction heads take thousands of steps to find is there from the start. Its values count
    four times.
    """

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__(config, is_cross_attention=True, layer_idx=layer_idx)
        if config.cca_match:
            self.match = nn.Parameter(torch.empty(config.n_head, CONTEXT))

    def init_weights(self) -> None:
        init.zeros_(self.c_proj.weight)
        if self.config.cca_match:  # from heads that go by matches as the copy head does to one that does not
            strength = torch.linspace(1, 0, self.num_heads).unsqueeze(1)
            init.copy_(self.match, strength * torch.tensor(MATCH_WEIGHTS))

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, d)
        encoded: torch.Tensor | None,  # (B, C, k·r, d) neighbors of the chunks completed in this call
        reading: Reading,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # (B, T, d), attention weights (B, heads, T, k·r) if there are any
        keys, values = self._keys_values(encoded, reading)
        readers = reading.readers
        queries = readers.group(self.q_attn(hidden_states))  # (B·G, w, d)

        mask = self._match_bias(reading, queries.dtype) if self.config.cca_match else reading.attention_mask
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
        output = readers.ungroup(output.flatten(-2))
        output = self.c_proj(VALUE_SCALE * output if self.config.cca_match else output)
        output = torch.where(reading.readable.unsqueeze(-1), self.resid_dropout(output), 0.0)
        return output, None if weights is None else self._weights_by_column(weights, reading)

    def _keys_values(self, encoded: torch.Tensor | None, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the groups' neighbors, (B·G, k·r, d) each; with a cache, after adding this call's to it."""
        new = {}
        if encoded is not None:  # projected as (B·C, k·r, d): quantized projections take no more than three dimensions
            projected = self.c_attn(encoded.flatten(0, 1)).unflatten(0, encoded.shape[:2])
            new = dict(zip(("keys", "values"), projected.split(self.split_size, dim=-1), strict=True))
        known = remember_chunks(reading, self.layer_idx, new)
        return known["keys"].flatten(0, 1), known["values"].flatten(0, 1)

    def _match_bias(self, reading: Reading, dtype: torch.dtype) -> torch.Tensor:
        """Return the bias (B·G, heads, w, k·r) by matches; the lowest number where there is no neighbor token."""
        # embeddings are not moved by it: learned is whether to look where they match
        matches = reading.matches.detach()
        bias = (SCALE * self.match.float() @ matches.flatten(1)).unflatten(1, matches.shape[1:]).transpose(0, 1)
        return bias.to(dtype).masked_fill(reading.hidden[:, None, None], torch.finfo(dtype).min)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(N, tokens, d) -> (N, heads, tokens, head_dim)."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _weights_by_column(self, weights: torch.Tensor, reading: Reading) -> torch.Tensor:
        """Attention weights (B·G, heads, w, k·r) -> (B, heads, T, k·r), zero where a column reads nothing."""
        by_column = reading.readers.ungroup(weights.transpose(1, 2).flatten(2))  # (B, T, heads·k·r)
        by_column = torch.where(reading.readable.unsqueeze(-1), by_column, 0.0)
        return by_column.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
