"""The attention plan: which tokens of a call attend to which neighbors, including cached ones.

Shapes: B rows, T tokens of this call, S slots (chunks completed in this call), C complete chunks in
the cache, G groups of w queries, k neighbors of a chunk, r tokens of a neighbor, d hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask

from configuration_retro import RetroConfig

from .cache import RetroCache
from .chunk_grid import ChunkGrid, Movable, QueryGroups, take_chunks
from .neighbor_encoder import open_if_empty
from .neighbor_inputs import NeighborInputs


@dataclass
class CachedChunks(Movable):
    """The cached chunks: which ones this call writes, and which ones its query groups read.

    Attributes:
        cache: the memory of earlier chunks.
        slots: (B, C) int64, the slot of this call that is written to chunk c, -1 for none.
        group_chunks: (B, G) int64, the chunk of each group.
    """

    cache: RetroCache
    slots: torch.Tensor
    group_chunks: torch.Tensor

    def update(self, owner: int | str, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Store new states (B, S, …) by name, and return the states of the groups (B, G, …)."""
        memory = self.cache.neighbor_memory.setdefault(owner, {})
        for name, states in new.items():
            memory[name] = write_chunks(memory.get(name), states, self.slots)
        # Chunks that were completed later, without neighbors, have no stored states. They are
        # masked, so any state will do.
        return {
            name: take_chunks(states, self.group_chunks.clamp(max=states.shape[1] - 1))
            for name, states in memory.items()
        }


@dataclass
class AttentionPlan(Movable):
    """The columns and neighbors of one call: which attend to which, in all its layers.

    Attributes:
        queries: this call's columns, grouped by the chunk whose neighbors they attend to (G groups
            of w places).
        can_attend: (B, T) bool, True where the column's chunk has neighbors.
        neighbor_mask: (B, G, k·r) bool, True where the group's chunk has a neighbor token.
        attention_mask: the same for the attention implementation. None: every token may be attended
            to, or each layer makes its own (`cca_match`).
        cached: the cache's chunks. None without a cache: group g is then slot g of this call.
    """

    queries: QueryGroups
    can_attend: torch.Tensor
    neighbor_mask: torch.Tensor
    attention_mask: Any
    cached: CachedChunks | None

    @property
    def is_masked(self) -> torch.Tensor:
        """(B·G, k·r) bool, True where there is no neighbor token. All False in empty groups."""
        return ~open_if_empty(self.neighbor_mask).flatten(0, 1)

    def recall(self, owner: int | str, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return states of the groups' neighbors by name, (B, G, …), after adding new ones.

        Args:
            owner: the part of the model that the states belong to (see
                `RetroCache.neighbor_memory`).
            new: (B, slots, …) by name, for the chunks completed in this call; empty if there are
                none.
        """
        return new if self.cached is None else self.cached.update(owner, new)


def plan_attention(
    config: RetroConfig,
    grid: ChunkGrid,
    hidden_states: torch.Tensor,
    neighbors: NeighborInputs | None,
    cache: RetroCache | None,
) -> AttentionPlan | None:
    """Plan a call's attention to neighbors, and write the mask of its neighbors into the cache.

    Args:
        hidden_states: (B, T, d), only for their shape, type and device.
        neighbors: those of the chunks that this call completes, if any.

    Returns:
        None if no chunk has been given neighbors so far.
    """
    neighbor_mask = None
    if neighbors is not None:
        neighbor_mask = neighbors.mask.flatten(2) & grid.is_completed(neighbors.num_slots).unsqueeze(-1)  # (B, C, k·r)
    if cache is not None:
        cached = _update_mask(grid, neighbor_mask, cache)
        if cached is None:
            return None
        assert cache.neighbor_mask is not None, "the mask was just written"
        first_group = cached.group_chunks[:, :1]
        group_mask = take_chunks(cache.neighbor_mask, cached.group_chunks)
    elif neighbor_mask is not None:
        cached, first_group, group_mask = None, grid.first_chunk, neighbor_mask
    else:
        return None

    queries = grid.group_queries(first_group, group_mask.shape[1])
    has_neighbors = group_mask.any(-1).repeat_interleave(queries.width, dim=1)  # (B, G·w)
    can_attend = queries.is_grouped & has_neighbors.gather(1, queries.places)
    attention_mask = None
    if config.cca_layers and not config.cca_match:
        attention_mask = _cross_attention_mask(config, hidden_states, group_mask, queries.width)
    return AttentionPlan(queries, can_attend, group_mask, attention_mask, cached)


def _update_mask(grid: ChunkGrid, neighbor_mask: torch.Tensor | None, cache: RetroCache) -> CachedChunks | None:
    """Write this call's neighbor mask into the cache; return None if it has no neighbors so far."""
    if neighbor_mask is None and cache.neighbor_mask is None:
        return None
    assert cache.tokens is not None, "the call's tokens are in the cache"
    num_chunks = max(grid.num_chunks(cache.tokens.shape[1]), 1)
    slots = torch.arange(num_chunks, device=grid.first.device) - grid.first_chunk
    in_call = slots >= 0  # these chunks are overwritten, with an empty mask if they have no neighbors
    num_slots = 0 if neighbor_mask is None else neighbor_mask.shape[1]
    slots = torch.where(in_call & (slots < num_slots), slots, -1)
    if neighbor_mask is None:
        assert cache.neighbor_mask is not None
        neighbor_mask = cache.neighbor_mask.new_zeros(slots.shape[0], 1, cache.neighbor_mask.shape[2])
    written = write_chunks(cache.neighbor_mask, neighbor_mask, slots)
    cache.neighbor_mask = written & ~(in_call & (slots < 0)).unsqueeze(-1)

    num_groups = min(grid.most_attended_chunks(), num_chunks)
    first_group = grid.first_attended_chunk.clamp(0, num_chunks - num_groups)
    return CachedChunks(cache, slots, first_group + torch.arange(num_groups, device=first_group.device))


def write_chunks(memory: torch.Tensor | None, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return memory, grown to C chunks, with states (B, S, …) written where slots (B, C) >= 0."""
    num_chunks = slots.shape[1]
    grown = states.new_zeros(states.shape[0], num_chunks, *states.shape[2:])
    if memory is not None:
        grown[:, : memory.shape[1]] = memory[:, :num_chunks]
    is_written = (slots >= 0).view(*slots.shape, *[1] * (states.ndim - 2))
    return torch.where(is_written, take_chunks(states, slots.clamp(min=0)), grown)


def _cross_attention_mask(
    config: RetroConfig, hidden_states: torch.Tensor, mask: torch.Tensor, width: int
) -> Any:  # a tensor, or what the attention implementation takes in its place
    """Return the mask (B, G, k·r) of groups of `width` queries for the attention implementation."""
    mask = open_if_empty(mask).flatten(0, 1)
    if attention_implementation(config) != config._attn_implementation:
        return mask[:, None, None, :]
    # transformers uses only the shape, type and device of these two
    queries = hidden_states.new_empty(mask.shape[0], width, 1)
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
    if "flash" in implementation or (config.cca_match and implementation != "eager"):
        return "sdpa"
    return implementation
