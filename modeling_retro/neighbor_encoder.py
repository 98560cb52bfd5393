"""The neighbor encoder: a small bidirectional transformer, conditioned on the neighbors' query."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention

from configuration_retro import RetroConfig

from .chunk_grid import take_columns
from .cross_attention import CrossAttention, cross_attention_mask, open_if_empty
from .movable import Movable
from .norms import make_norm


class RetroEncoderLayer(GradientCheckpointingLayer):
    """One layer of the encoder: self-attention in both directions, cross-attention, MLP.

    In `encoder_cca_layers` it attends to the decoder's states of the query.
    """

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.self_attention = GPT2Attention(config, layer_idx=layer_idx)
        self.self_attention.is_causal = False
        if layer_idx in config.encoder_cca_layers:
            self.ln_cross = make_norm(config)
            self.ln_chunk = make_norm(config)
            self.cross_attention = CrossAttention(config, layer_idx=layer_idx)
        self.ln_2 = make_norm(config)
        self.mlp = GPT2MLP(config.n_inner or 4 * config.n_embd, config)
        if config.activation_function == "gelu_new":
            # the same function in one kernel; the encoder has no GPT-2 weights to agree with to the
            # last bit
            self.mlp.act = ACT2FN["gelu_pytorch_tanh"]

    def forward(
        self,
        hidden_states: torch.Tensor,  # (N·k, r, d): N points, k neighbors each
        query_states: torch.Tensor,  # (N, m, d)
        attention_mask: torch.Tensor | None = None,  # prepared for the attention implementation
        query_mask: torch.Tensor | None = None,  # likewise, for tokens that a short query lacks
    ) -> torch.Tensor:  # (N·k, r, d)
        """Return the next hidden states."""
        attn_output, _ = self.self_attention(self.ln_1(hidden_states), attention_mask=attention_mask)
        hidden_states = hidden_states + attn_output

        if hasattr(self, "cross_attention"):
            # each token attends to all of the query and to nothing else, so the k neighbors share
            # one set of keys
            tokens = self.ln_cross(hidden_states).view(query_states.shape[0], -1, query_states.shape[-1])
            attn_output = self.cross_attention(tokens, self.ln_chunk(query_states), query_mask)
            hidden_states = hidden_states + attn_output.view_as(hidden_states)

        return hidden_states + self.mlp(self.ln_2(hidden_states))


class NeighborEncoder(nn.Module):
    """The encoder of the paper's section 2.3 and algorithm 1."""

    def __init__(self, config: RetroConfig):
        super().__init__()
        self.config = config
        assert config.neighbor_length is not None, "set when the configuration is built"
        self.wpe = nn.Embedding(config.neighbor_length, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList([RetroEncoderLayer(config, layer_idx=i) for i in range(config.encoder_num_layers)])
        self.ln_f = make_norm(config)

    def forward(
        self,
        token_embeds: torch.Tensor,  # (B, C, k, r, d), the decoder's token embeddings
        attention_mask: torch.Tensor,  # (B, C, k, r) bool
        query_states: torch.Tensor,  # (B, C, m, d)
        query_mask: torch.Tensor | None = None,  # (B, C, m) bool, False before a short query. None: all are long
    ) -> torch.Tensor:  # (B, C, k·r, d)
        """Encode neighbors from their token embeddings and the decoder's states of the queries."""
        batch_size, num_points, num_neighbors, neighbor_length, dim = token_embeds.shape
        positions = torch.arange(neighbor_length, device=token_embeds.device)
        hidden_states = self.drop(token_embeds + self.wpe(positions).to(token_embeds.device))
        hidden_states = hidden_states.view(-1, neighbor_length, dim)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=open_if_empty(attention_mask.reshape(-1, neighbor_length)),
        )
        query_states = query_states.reshape(-1, query_states.shape[-2], dim)
        if query_mask is not None and self.config.encoder_cca_layers:
            num_tokens = num_neighbors * neighbor_length
            query_mask = cross_attention_mask(self.config, hidden_states, query_mask.flatten(0, 1), num_tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, query_states, attention_mask=mask, query_mask=query_mask)
        return self.ln_f(hidden_states).view(batch_size, num_points, num_neighbors * neighbor_length, dim)


@dataclass
class UnencodedNeighbors(Movable):
    """The neighbors of a call before they are encoded.

    The first cross-attention layer encodes them, since it has the decoder's states.

    Attributes:
        encoder: the model's neighbor encoder.
        token_embeds: (B, C, k, r, d) embeddings of the neighbors' tokens.
        attention_mask: (B, C, k, r) bool.
        query_columns: (B, C·m) int64, the columns of the queries, from the start of the cache.
        query_mask: (B, C, m) bool, False before the first token of a query that is shorter than m.
            None: no query is.
    """

    encoder: NeighborEncoder
    token_embeds: torch.Tensor
    attention_mask: torch.Tensor
    query_columns: torch.Tensor
    query_mask: torch.Tensor | None

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        """Return the encoded neighbors (B, C, k·r, d), given the decoder's states (B, L, d).

        What is masked is encoded to any states. A compiled graph has one shape and encodes all of
        it; otherwise missing neighbors are left out, and all places behind the longest one.
        """
        num_points = self.token_embeds.shape[1]
        query_states = take_columns(states, self.query_columns).unflatten(1, (num_points, -1))
        if not torch.compiler.is_compiling():
            rows, longest = self._real()
            if len(rows) * longest < self.attention_mask.numel():
                return self._encode_real(query_states, rows, longest).to(states.device)
        encoded = self.encoder(self.token_embeds, self.attention_mask, query_states, self.query_mask)
        return encoded.to(states.device)

    def _real(self) -> tuple[torch.Tensor, int]:
        """Return the numbers (n,) of the neighbors that have tokens, and the length of the longest.

        There is one at least: processes in parallel wait for each other's calls of the encoder.
        """
        length = self.attention_mask.shape[-1]
        ends = torch.arange(1, length + 1, device=self.attention_mask.device)
        lengths = (self.attention_mask * ends).amax(-1).flatten()  # (B·C·k)
        longest = int(lengths.max())
        rows = lengths.nonzero().squeeze(1) if longest else lengths.new_zeros(1)
        return rows, longest or length

    def _encode_real(self, query_states: torch.Tensor, rows: torch.Tensor, longest: int) -> torch.Tensor:
        """Encode some neighbors (n,) of B·C·k in one call, each as that of a point of its own.

        Args:
            query_states: (B, C, m, d).
            longest: the places that are encoded. Other places and neighbors become 0.
        """
        batch_size, num_points, num_neighbors, length, dim = self.token_embeds.shape
        points = rows // num_neighbors
        real = self.encoder(  # (n, 1, longest, d)
            self.token_embeds.flatten(0, 2)[rows, None, None, :longest],
            self.attention_mask.flatten(0, 2)[rows, None, None, :longest],
            query_states.flatten(0, 1)[points].unsqueeze(1),
            None if self.query_mask is None else self.query_mask.flatten(0, 1)[points].unsqueeze(1),
        )
        encoded = real.new_zeros(batch_size * num_points * num_neighbors, length, dim)
        encoded = encoded.index_put((rows.unsqueeze(1), torch.arange(longest, device=rows.device)), real.squeeze(1))
        return encoded.view(batch_size, num_points, num_neighbors * length, dim)
