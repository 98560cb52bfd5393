"""REPLUG: an ensemble of prompts with one neighbor each (Shi et al., 2023, section 3).

Each neighbor of a retrieval point stands alone in front of the text. The next token's distribution
is the mean of the k distributions, weighted with the softmax of the neighbors' similarity scores.
The decoder reads the text k times, so k prompts that are short instead of one that is long.

Shapes: B rows of T tokens, C slots, each for one retrieval point, k neighbors of r tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .copy_baseline import slots_read
from .in_context import Progress, in_context_nats, in_context_prompts


def replug_weights(neighbor_attention_mask: torch.Tensor, neighbor_scores: torch.Tensor) -> torch.Tensor:
    """Return the log-weight of each neighbor's distribution: the log-softmax of the scores.

    A missing neighbor has weight 0. Without any neighbor the first one, an empty text, has all.

    Args:
        neighbor_attention_mask: (..., k, r), False for padding and missing neighbors.
        neighbor_scores: (..., k), the similarities. Those of missing neighbors are ignored.

    Returns:
        (..., k) float32.
    """
    there = neighbor_attention_mask.bool().any(-1)
    scores = neighbor_scores.float().masked_fill(~there, -torch.inf)
    scores[..., 0] = scores[..., 0].masked_fill(~there.any(-1), 0.0)
    return scores.log_softmax(-1)


@torch.no_grad()
def replug_nats(
    decoder: Callable[..., Any],
    input_ids: torch.Tensor,
    neighbor_ids: torch.Tensor,
    neighbor_attention_mask: torch.Tensor,
    neighbor_scores: torch.Tensor,
    chunk_size: int,
    first_point: torch.Tensor | None = None,
    retrieval_stride: int | None = None,
    separator: Sequence[int] = (),
    max_tokens: int | None = None,
    first: int = 0,
    progress: Progress = iter,
) -> torch.Tensor:
    """Compute the nats of each token but the first under REPLUG's ensemble.

    Positions before the first point, and those of a point without neighbors, have the text alone.

    Args:
        decoder: as for [`evaluation_retro.in_context.in_context_nats`].
        neighbor_scores: (B, C, k), the similarities of the neighbors.
        input_ids, neighbor_ids, neighbor_attention_mask, chunk_size, first_point, retrieval_stride,
            separator, max_tokens, first: as for [`evaluation_retro.in_context.in_context_prompts`].
        progress: goes through the numbers of batches, and may show a bar.

    Returns:
        (B, T − 1) float32, nan before position `first`.

    Raises:
        ValueError: a neighbor leaves no room in the window for the predicted tokens.
    """
    num_slots, k = neighbor_ids.shape[1:3]
    weights = replug_weights(neighbor_attention_mask, neighbor_scores)  # (B, C, k)
    alone = torch.full((len(input_ids), 1, k), -torch.inf, device=weights.device)
    alone[..., 0] = 0.0
    weights = torch.cat([weights, alone], dim=1)  # the last slot is for positions that no other one serves
    slots = slots_read(input_ids, chunk_size, first_point, retrieval_stride)  # (B, T − 1)
    slots = torch.where((slots >= 0) & (slots < num_slots), slots, num_slots)
    at = weights[torch.arange(len(slots), device=slots.device)[:, None], slots]  # (B, T − 1, k)

    # a row for each text and neighbor
    texts = input_ids.repeat_interleave(k, 0)
    prompts = in_context_prompts(
        texts,
        neighbor_ids.transpose(1, 2).flatten(0, 1).unsqueeze(2),
        neighbor_attention_mask.transpose(1, 2).flatten(0, 1).unsqueeze(2),
        chunk_size,
        None if first_point is None else first_point.repeat_interleave(k, 0),
        retrieval_stride,
        separator,
        max_tokens,
        first,
    )
    counts = at.transpose(1, 2).flatten(0, 1) > -torch.inf  # (B k, T − 1)
    counted = [prompt for prompt in prompts if counts[prompt.row, prompt.positions.start]]
    nats = in_context_nats(decoder, counted, texts, progress).view(-1, k, texts.shape[1] - 1).transpose(1, 2)
    return -torch.where(at > -torch.inf, at - nats, at).logsumexp(-1)
