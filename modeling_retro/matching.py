"""Token matching: how well a text's last tokens match those before each place of a neighbor.

The copy head and, with `cca_match`, cross-attention use it: where the last tokens occur in a
neighbor, the token that follows them there may come next here.

Shapes: B rows, T tokens of this call, d hidden size, n = `match_length`; G groups of w queries (see
`QueryGroups`); k neighbors of a point, r tokens of a neighbor.
"""

import torch
import torch.nn.functional as F

from configuration_retro import RetroConfig

from .attention_plan import AttentionPlan
from .cache import RetroCache
from .chunk_grid import ChunkGrid, QueryGroups, take_columns
from .neighbor_inputs import NeighborInputs


def match_tokens(
    config: RetroConfig,
    grid: ChunkGrid,
    plan: AttentionPlan | None,
    token_embeds: torch.Tensor,  # (B, T, d)
    neighbors: NeighborInputs | None,
    neighbor_embeds: torch.Tensor | None,  # (B, C, k, r, d)
    cache: RetroCache | None,
) -> torch.Tensor | None:  # (n, B·G, w, k·r)
    """Return how well each query's last 1, 2, … n tokens match those before each place, in float32.

    The match of s tokens x_i, x_{i−1}, … of the text with place j of a neighbor y is the product
    c_1 · … · c_s of cosine similarities of token embeddings, negative ones counted as 0: c_1 of x_i
    and y_{j−1}, c_2 of x_{i−1} and y_{j−2}, and so on. With a cache, a point's neighbors are
    prepared once.

    Args:
        token_embeds: embeddings of this call's tokens, without positions.
        neighbors: those of the points that this call reaches. Masked tokens match nothing.
        neighbor_embeds: embeddings of their tokens.
        cache: it is extended by this call's embeddings.

    Returns:
        None if there are no neighbors so far, or nothing uses matches.
    """
    if not (config.copy_head or config.cca_match) or (plan is None and cache is None):
        return None
    # cross-attention's matches have no gradient
    with torch.set_grad_enabled(torch.is_grad_enabled() and bool(config.copy_head)):
        token_embeds = F.normalize(token_embeds, dim=-1)
        if cache is not None:
            token_embeds = cache.append_token_embeds(token_embeds)  # (B, L, d)
        if plan is None:
            return None
        new = {}
        if neighbors is not None and neighbor_embeds is not None:
            neighbor_embeds = F.normalize(neighbor_embeds, dim=-1)
            new["keys"] = (neighbor_embeds * neighbors.mask.unsqueeze(-1)).flatten(2, 3)
        queries = _last_tokens(config.match_length, grid, plan.queries, token_embeds)  # (B·G, w·n, d)
        if cache is not None and plan.queries.is_trivial:
            cache.last_embeds = queries
        return _match(config, plan, queries, new)


def match_next_token(
    config: RetroConfig, plan: AttentionPlan, token_embeds: torch.Tensor, cache: RetroCache
) -> torch.Tensor | None:
    """Match one token a row, as `match_tokens` does, with the neighbors of the last call.

    Args:
        token_embeds: (B, 1, d).
    """
    if cache.last_embeds is None:  # nothing uses matches
        return None
    token_embeds = F.normalize(token_embeds, dim=-1)
    cache.append_token_embeds(token_embeds)
    cache.last_embeds = torch.cat([token_embeds, cache.last_embeds[:, :-1]], dim=1)
    return _match(config, plan, cache.last_embeds, {})


def _match(
    config: RetroConfig, plan: AttentionPlan, queries: torch.Tensor, new: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Match the last tokens (B·G, w·n, d) of queries with neighbors, (n, B·G, w, k·r)."""
    keys = plan.recall("match", new)["keys"].flatten(0, 1)  # (B·G, k·r, d)
    cosines = (queries @ keys.transpose(1, 2)).float().clamp(min=0.0)  # (B·G, w·n, k·r)
    assert config.num_neighbors is not None, "set when the configuration is built"
    return _multiply_along(cosines, config.match_length, config.num_neighbors)


def _last_tokens(number: int, grid: ChunkGrid, queries: QueryGroups, token_embeds: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of each query's last tokens, its own first, (B·G, w·number, d)."""
    columns, exists = grid.columns_before(number, token_embeds.shape[1])  # (B, T, number)
    context = torch.where(exists.flatten(1).unsqueeze(-1), take_columns(token_embeds, columns.flatten(1)), 0.0)
    grouped = queries.group(context.view(*columns.shape[:2], -1))  # (B·G, w, number·d)
    return grouped.view(-1, queries.width * number, token_embeds.shape[-1])


def _multiply_along(cosines: torch.Tensor, match_length: int, num_neighbors: int) -> torch.Tensor:
    """Return the products of cosines (B·G, w·n, k·r) along matching tokens, (n, B·G, w, k·r)."""
    cosines = cosines.view(cosines.shape[0], -1, match_length, num_neighbors, cosines.shape[-1] // num_neighbors)
    matches: list[torch.Tensor] = []
    for distance in range(match_length):  # a place comes right after the tokens that match
        shifted = F.pad(cosines[:, :, distance], (distance + 1, 0))[..., : cosines.shape[-1]].flatten(2)
        matches.append(shifted * matches[-1] if matches else shifted)
    return torch.stack(matches)
