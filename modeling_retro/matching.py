"""How well the last tokens of a text match those before each place of the neighbors that it reads.

What the copy head and, with `cca_match`, cross-attention go by: a place is a token of a neighbor that could come next.

Shapes: B rows, T tokens of this call, d hidden size; G groups of at most w readers of one chunk (see `Readers`); k neighbors
a chunk, r tokens a neighbor.
"""

import torch
import torch.nn.functional as F

from configuration_retro import RetroConfig

from .cache import RetroCache
from .chunk_grid import ChunkGrid, take_rows
from .reading import Reading, remember_chunks

CONTEXT = 6  # tokens that are compared: the last one and those before it
# A few numbers decide all, and must go far in few steps at the learning rates of matrices: they are kept divided by this.
SCALE = 30.0
# What a match of 1, 2, … tokens counts to begin with: the same last token lifts a place above hundreds that have another,
# one before it above those as well.
MATCH_WEIGHTS = tuple(weight / SCALE for weight in (8.0, 6.0, 4.0, 3.0, 2.0, 2.0))


def match_context(
    config: RetroConfig,
    grid: ChunkGrid,
    reading: Reading | None,
    token_embeds: torch.Tensor,
    neighbor_embeds: torch.Tensor | None,
    neighbor_mask: torch.BoolTensor | None,
    cache: RetroCache | None,
) -> torch.Tensor | None:
    """How well the last 1, 2, … CONTEXT tokens of each reader match the ones before each place.

    A match of n tokens is the product c_1 · … · c_n of cosine similarities (of token embeddings, those below 0 counted as 0):
    c_1 of x_i and n_{j−1}, c_2 of x_{i−1} and n_{j−2} …, for token x_i of the text and place j of a neighbor. With a
    cache, a chunk's neighbors are prepared once.

    Args:
        token_embeds: (B, T, d) of this call's tokens, without positions.
        neighbor_embeds, neighbor_mask: (B, C, k, r, d) and (B, C, k, r) of the chunks that complete in this call; None if
            none does. A token that is masked matches nothing.

    Returns:
        (CONTEXT, B·G, w, k·r) float32; None if nothing is read.
    """
    token_embeds = F.normalize(token_embeds, dim=-1)
    if cache is not None:
        token_embeds = cache.append_token_embeds(token_embeds)
    if reading is None:
        return None
    new = {}
    if neighbor_embeds is not None:
        new["keys"] = (F.normalize(neighbor_embeds, dim=-1) * neighbor_mask.unsqueeze(-1)).flatten(2, 3)
    keys = remember_chunks(reading, "match", new)["keys"].flatten(0, 1)
    columns, exists = grid.columns_before(CONTEXT, token_embeds.shape[1])
    context = torch.where(exists.flatten(1).unsqueeze(-1), take_rows(token_embeds, columns.flatten(1)), 0.0)
    readers = reading.readers
    queries = readers.group(context.view(*columns.shape[:2], -1)).view(-1, readers.width * CONTEXT, keys.shape[-1])
    cosines = (queries @ keys.transpose(1, 2)).float().clamp(min=0.0)
    cosines = cosines.view(queries.shape[0], readers.width, CONTEXT, -1, config.neighbor_length)
    matches: list[torch.Tensor] = []
    for distance in range(CONTEXT):  # a place is one token further than the last token's like
        shifted = F.pad(cosines[:, :, distance], (distance + 1, 0))[..., : cosines.shape[-1]].flatten(2)
        matches.append(shifted * matches[-1] if matches else shifted)
    return torch.stack(matches)
