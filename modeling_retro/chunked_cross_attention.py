"""Chunked cross-attention: each token attends to the neighbors of the last point."""

import torch
from torch import nn
from transformers import initialization as init

from configuration_retro import RetroConfig

from .attention_plan import AttentionPlan
from .cross_attention import CrossAttention


class ChunkedCrossAttention(CrossAttention):
    """One decoder layer's cross-attention to one point's neighbors (paper, section 2.4).

    It is GPT-2's multi-head attention, with keys and values from the encoded neighbors. The output
    projection starts at zero, so a model freshly built on GPT-2 equals that GPT-2.

    With `cca_match`, each head adds to its attention scores how well the last tokens match those
    before each place (see `match_tokens`), with learned weights of its own. Induction heads take
    thousands of steps to learn that; here it is there from the start. The attention output is then
    multiplied by `cca_match_output_scale`.
    """

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        if config.cca_match:
            self.match = nn.Parameter(torch.empty(config.n_head, config.match_length))

    def init_weights(self) -> None:
        """Close the output projection, and set the weights of matches.

        The first head starts with the weights of the copy head, the last with none.
        """
        init.zeros_(self.c_proj.weight)
        if self.config.cca_match:
            strength = torch.linspace(1, 0, self.num_heads).unsqueeze(1)
            init.copy_(self.match, strength * torch.tensor(self.config.stored_match_weights))

    def forward(  # type: ignore[override]  # its arguments are the plan's
        self,
        hidden_states: torch.Tensor,  # (B, T, d)
        encoded: torch.Tensor | None,  # (B, C, k·r, d), neighbors of the points reached in this call
        plan: AttentionPlan,
        matches: torch.Tensor | None = None,  # (n, B·G, w, k·r), needed with cca_match
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # (B, T, d), attention weights (B, heads, T, k·r) if there are any
        """Attend to the neighbors; return 0 for tokens that have none."""
        keys, values = self._keys_values(encoded, plan)
        queries = plan.queries.group(self.q_attn(hidden_states))  # (B·G, w, d)

        mask = plan.attention_mask
        if self.config.cca_match:
            assert matches is not None, "tokens are matched before the layers run"
            mask = self._match_bias(matches, plan, queries.dtype)
        output, weights = self.attend(queries, keys, values, mask)
        output = plan.queries.ungroup(output)
        output = self.c_proj(self.config.cca_match_output_scale * output if self.config.cca_match else output)
        output = torch.where(plan.can_attend.unsqueeze(-1), self.resid_dropout(output), 0.0)
        return output, None if weights is None else self._weights_by_column(weights, plan)

    def _keys_values(self, encoded: torch.Tensor | None, plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (B·G, k·r, d) of the groups' neighbors, after adding new ones."""
        new = {}
        if encoded is not None:  # projected as (B·C, k·r, d): quantized projections take at most three dimensions
            projected = self.c_attn(encoded.flatten(0, 1)).unflatten(0, encoded.shape[:2])
            new = dict(zip(("keys", "values"), projected.split(self.split_size, dim=-1), strict=True))
        known = plan.recall(self.layer_idx, new)
        return known["keys"].flatten(0, 1), known["values"].flatten(0, 1)

    def _match_bias(self, matches: torch.Tensor, plan: AttentionPlan, dtype: torch.dtype) -> torch.Tensor:
        """Return the bias on scores (B·G, heads, w, k·r), lowest where there is no token."""
        matches = matches.detach()  # the weights of matches are learned here, the embeddings are not
        bias = self.config.match_scale * self.match.float() @ matches.flatten(1)
        bias = bias.unflatten(1, matches.shape[1:]).transpose(0, 1)
        return bias.to(dtype).masked_fill(plan.is_masked[:, None, None], torch.finfo(dtype).min)

    def _weights_by_column(self, weights: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Return weights (B·G, heads, w, k·r) as (B, heads, T, k·r), 0 where there are none."""
        by_column = plan.queries.ungroup(weights.transpose(1, 2).flatten(2))  # (B, T, heads·k·r)
        by_column = torch.where(plan.can_attend.unsqueeze(-1), by_column, 0.0)
        return by_column.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
