"""Who reads which chunk's neighbors in a call, which of their tokens exist, and the memory of them in the cache."""

from dataclasses import dataclass

import torch
from transformers.masking_utils import create_bidirectional_mask

from configuration_retro import RetroConfig

from .cache import RetroCache
from .chunk_grid import ChunkGrid, Movable, Readers, take_chunks
from .neighbor_encoder import open_if_empty


@dataclass
class Reading(Movable):
    """The part of a call that its cross-attention layers share: who reads which chunk, and which neighbor tokens exist.

    readers:        this call's columns, grouped by the chunk that they read (G groups).
    group_chunks:   (B, G) where group g's chunk stands in the cache; None without a cache: group g is slot g.
    readable:       (B, T) True where the column reads a chunk that has neighbors.
    group_mask:     (B, G, k·r) True where the group's chunk has a neighbor token.
    attention_mask: the same, prepared for the attention implementation; None with `cca_match`.
    cache:          the memory of earlier chunks, and `slots` (B, C), the slot of this call that fills chunk c of it
                    (-1: none does).
    matches:        (CONTEXT, B·G, w, k·r) how well the readers' last tokens match those before each place (see
                    `match_context`), where something goes by that.
    """

    readers: Readers
    readable: torch.BoolTensor
    group_mask: torch.BoolTensor
    attention_mask: torch.Tensor | None
    group_chunks: torch.LongTensor | None = None
    cache: RetroCache | None = None
    slots: torch.LongTensor | None = None
    matches: torch.Tensor | None = None

    @property
    def hidden(self) -> torch.BoolTensor:
        """(B·G, k·r) True where there is no neighbor token to look at; False throughout where there is none at all."""
        return ~open_if_empty(self.group_mask).flatten(0, 1)


def build_reading(
    config: RetroConfig,
    grid: ChunkGrid,
    hidden_states: torch.Tensor,
    neighbor_mask: torch.BoolTensor | None,
    cache: RetroCache | None,
) -> Reading | None:
    """Prepare a call's chunked cross-attention, and write its neighbors' mask into the cache.

    Args:
        hidden_states: (B, T, d), for shapes, dtype and device alone.
        neighbor_mask: (B, C, k·r) of this call's slots, None if the call has none.

    Returns:
        None if no chunk has been given a neighbor so far: there is nothing to read.
    """
    slots = group_chunks = None
    if neighbor_mask is not None:
        neighbor_mask = neighbor_mask & grid.completed(neighbor_mask.shape[1]).unsqueeze(-1)
    if cache is None:
        if neighbor_mask is None:
            return None
        first_group, group_mask = grid.first_chunk, neighbor_mask
    else:
        slots = _remember_mask(grid, neighbor_mask, cache)
        if cache.neighbor_mask is None:
            return None
        # a call of T tokens reads at most this many chunks, the first of them the one that was complete before it
        length, num_chunks = hidden_states.shape[1], cache.neighbor_mask.shape[1]
        num_groups = min((length + grid.chunk_size - 2) // grid.chunk_size + 1, num_chunks)
        first_group = ((grid.first + 1) // grid.chunk_size - 1).clamp(0, num_chunks - num_groups)
        group_chunks = first_group + torch.arange(num_groups, device=first_group.device)
        group_mask = take_chunks(cache.neighbor_mask, group_chunks)

    readers = grid.readers(first_group, group_mask.shape[1])
    has_neighbors = group_mask.any(-1).repeat_interleave(readers.width, dim=1)  # (B, G·w)
    readable = readers.reads & has_neighbors.gather(1, readers.slots)

    attention_mask = None  # with cca_match, each layer makes its own
    if config.cca_layers and not config.cca_match:
        attention_mask = _cross_attention_mask(config, hidden_states, group_mask, readers.width)
    return Reading(readers, readable, group_mask, attention_mask, group_chunks, cache, slots)


def _cross_attention_mask(
    config: RetroConfig, hidden_states: torch.Tensor, mask: torch.BoolTensor, width: int
) -> torch.Tensor | None:
    """Over groups of `width` queries and their k·r neighbor tokens, mask (B, G, k·r), for the attention implementation."""
    mask = open_if_empty(mask).flatten(0, 1)
    if attention_implementation(config) != config._attn_implementation:
        return mask[:, None, None, :]
    # transformers reads shape, dtype and device of these two alone
    queries = hidden_states.new_empty(mask.shape[0], width, 1)
    keys = hidden_states.new_empty(*mask.shape, 1)
    return create_bidirectional_mask(
        config=config, inputs_embeds=queries, encoder_hidden_states=keys, attention_mask=mask
    )


def attention_implementation(config: RetroConfig) -> str:
    """The model's attention implementation for cross-attention, but SDPA for flash attention, which in transformers takes a
    padding mask over keys only where keys and queries are the same tokens, and with `cca_match` for all that cannot add to
    the scores."""
    implementation = config._attn_implementation
    if "flash" in implementation or (config.cca_match and implementation != "eager"):
        return "sdpa"
    return implementation


def remember_chunks(reading: Reading, reader: int | str, states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each state of the chunks that the groups read, (B, G, …); a cache is first extended by this call's states.

    Args:
        reader: whose memory it is: a layer, or a name.
        states: (B, slots, …) each, by name, of the chunks completed in this call; empty if none is.
    """
    if reading.cache is None:
        return states
    memory = reading.cache.neighbor_memory.setdefault(reader, {})
    for name, new in states.items():
        memory[name] = fill_chunks(memory.get(name), new, reading.slots)
    # chunks completed since without neighbors are not in the memory; they are masked, whatever is read for them
    return {
        name: take_chunks(known, reading.group_chunks.clamp(max=known.shape[1] - 1)) for name, known in memory.items()
    }


def fill_chunks(memory: torch.Tensor | None, states: torch.Tensor, slots: torch.LongTensor) -> torch.Tensor:
    """Write this call's states (B, slots, …) into the memory (B, ≤C, …) where `slots` (B, C) is not -1; returns (B, C, …)."""
    num_chunks = slots.shape[1]
    grown = states.new_zeros(states.shape[0], num_chunks, *states.shape[2:])
    if memory is not None:
        grown[:, : memory.shape[1]] = memory[:, :num_chunks]
    fills = (slots >= 0).view(*slots.shape, *[1] * (states.ndim - 2))
    return torch.where(fills, take_chunks(states, slots.clamp(min=0)), grown)


def _remember_mask(
    grid: ChunkGrid, neighbor_mask: torch.BoolTensor | None, cache: RetroCache
) -> torch.LongTensor | None:
    """Write this call's neighbor mask into the cache; returns which slot fills which chunk (see `Reading.slots`)."""
    if neighbor_mask is None and cache.neighbor_mask is None:
        return None
    num_chunks = max(cache.tokens.shape[1] // grid.chunk_size, 1)
    num_slots = 0 if neighbor_mask is None else neighbor_mask.shape[1]
    chunks = torch.arange(num_chunks, device=grid.first.device)
    slots = chunks - grid.first_chunk
    in_call = slots >= 0  # chunks of this call: written anew, be it to say that they have no neighbors
    slots = torch.where(in_call & (slots < num_slots), slots, -1)
    if neighbor_mask is None:
        neighbor_mask = cache.neighbor_mask.new_zeros(slots.shape[0], 1, cache.neighbor_mask.shape[2])
    remembered = fill_chunks(cache.neighbor_mask, neighbor_mask, slots)
    cache.neighbor_mask = remembered & ~(in_call & (slots < 0)).unsqueeze(-1)
    return slots
