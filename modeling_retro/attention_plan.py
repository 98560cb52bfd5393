"""The attention plan: which tokens of a call attend to which neighbors, including cached ones.

Shapes: B rows, T tokens of this call, S slots (retrieval points reached in this call), C points in
the cache, G groups of w queries, k neighbors of a point, r tokens of a neighbor, d hidden size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from configuration_retro import RetroConfig

from .cache import RetroCache
from .chunk_grid import ChunkGrid, QueryGroups, take_points
from .cross_attention import cross_attention_mask, open_if_empty
from .movable import Movable
from .neighbor_inputs import NeighborInputs


@dataclass
class CachedPoints(Movable):
    """The cached points: which ones this call writes, and which ones its query groups read.

    Attributes:
        memory: the cache's `neighbor_memory`, of earlier points.
        slots: (B, C) int64, the slot of this call that is written to point c, -1 for none.
        group_points: (B, G) int64, the number of each group's point.
        recalled: the states of the groups that `update` has returned, by owner. Calls of one token
            that read the same points share them.
    """

    memory: dict[int | str, dict[str, torch.Tensor]]
    slots: torch.Tensor
    group_points: torch.Tensor
    recalled: dict[int | str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def update(self, owner: int | str, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Store new states (B, S, …) by name, and return the states of the groups (B, G, …)."""
        if not new and owner in self.recalled:
            return self.recalled[owner]
        memory = self.memory.setdefault(owner, {})
        for name, states in new.items():
            memory[name] = write_points(memory.get(name), states, self.slots)
        # Points that were reached later, without neighbors, have no stored states. They are masked,
        # so any state will do.
        self.recalled[owner] = {
            name: take_points(states, self.group_points.clamp(max=states.shape[1] - 1))
            for name, states in memory.items()
        }
        return self.recalled[owner]


@dataclass
class AttentionPlan(Movable):
    """The columns and neighbors of one call: which attend to which, in all its layers.

    Attributes:
        queries: this call's columns, grouped by the point whose neighbors they read (G groups of w
            places).
        can_attend: (B, T) bool, True where the column's point has neighbors.
        neighbor_mask: (B, G, k·r) bool, True where the group's point has a neighbor token.
        is_masked: (B·G, k·r) bool, True where there is no neighbor token. All False in empty
            groups.
        attention_mask: the same as `neighbor_mask` for the attention implementation. None: every
            token may be attended to, or each layer makes its own (`cca_match`).
        cached: the cache's points. None without a cache: group g is then slot g of this call.
    """

    queries: QueryGroups
    can_attend: torch.Tensor
    neighbor_mask: torch.Tensor
    is_masked: torch.Tensor
    attention_mask: Any
    cached: CachedPoints | None

    def recall(self, owner: int | str, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return states of the groups' neighbors by name, (B, G, …), after adding new ones.

        Args:
            owner: the part of the model that the states belong to (see
                `RetroCache.neighbor_memory`).
            new: (B, slots, …) by name, for the points reached in this call; empty if there are
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
        neighbors: those of the points that this call reaches, if any.

    Returns:
        None if no point has been given neighbors so far.
    """
    neighbor_mask = None
    if neighbors is not None:
        neighbor_mask = neighbors.mask.flatten(2) & grid.is_reached(neighbors.num_slots).unsqueeze(-1)  # (B, C, k·r)
    if cache is not None:
        cached = _update_mask(grid, neighbor_mask, cache)
        if cached is None:
            return None
        assert cache.neighbor_mask is not None, "the mask was just written"
        first_group = cached.group_points[:, :1]
        group_mask = take_points(cache.neighbor_mask, cached.group_points)
    elif neighbor_mask is not None:
        cached, first_group, group_mask = None, grid.first_reached, neighbor_mask
    else:
        return None

    queries = grid.group_queries(first_group, group_mask.shape[1])
    has_neighbors = group_mask.any(-1).repeat_interleave(queries.width, dim=1)  # (B, G·w)
    can_attend = queries.is_grouped & has_neighbors.gather(1, queries.places)
    attention_mask = None
    if config.cca_layers and not config.cca_match:
        attention_mask = cross_attention_mask(config, hidden_states, group_mask.flatten(0, 1), queries.width)
    is_masked = ~open_if_empty(group_mask).flatten(0, 1)
    return AttentionPlan(queries, can_attend, group_mask, is_masked, attention_mask, cached)


def _update_mask(grid: ChunkGrid, neighbor_mask: torch.Tensor | None, cache: RetroCache) -> CachedPoints | None:
    """Write this call's neighbor mask into the cache; return None if it has no neighbors so far."""
    if neighbor_mask is None and cache.neighbor_mask is None:
        return None
    assert cache.tokens is not None, "the call's tokens are in the cache"
    num_points = max(grid.points.most(cache.tokens.shape[1]), 1)
    slots = torch.arange(num_points, device=grid.first.device) - grid.first_reached
    in_call = slots >= 0  # these points are overwritten, with an empty mask if they have no neighbors
    num_slots = 0 if neighbor_mask is None else neighbor_mask.shape[1]
    slots = torch.where(in_call & (slots < num_slots), slots, -1)
    if neighbor_mask is None:
        assert cache.neighbor_mask is not None
        neighbor_mask = cache.neighbor_mask.new_zeros(slots.shape[0], 1, cache.neighbor_mask.shape[2])
    written = write_points(cache.neighbor_mask, neighbor_mask, slots)
    cache.neighbor_mask = written & ~(in_call & (slots < 0)).unsqueeze(-1)

    num_groups = min(grid.most_read(), num_points)
    first_group = grid.first_read.clamp(0, num_points - num_groups)
    group_points = first_group + torch.arange(num_groups, device=first_group.device)
    return CachedPoints(cache.neighbor_memory, slots, group_points)


def write_points(memory: torch.Tensor | None, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return memory, grown to C points, with states (B, S, …) written where slots (B, C) >= 0."""
    num_points = slots.shape[1]
    grown = states.new_zeros(states.shape[0], num_points, *states.shape[2:])
    if memory is not None:
        grown[:, : memory.shape[1]] = memory[:, :num_points]
    is_written = (slots >= 0).view(*slots.shape, *[1] * (states.ndim - 2))
    return torch.where(is_written, take_points(states, slots.clamp(min=0)), grown)
