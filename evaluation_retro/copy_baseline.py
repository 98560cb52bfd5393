"""The copy baseline: the decoder mixed with an n-gram copier over the same neighbors.

At each position the copier searches the position's neighbors for the last two tokens or, if they
are not there, for the last one. Its prediction is the distribution of the tokens that follow. The
baseline mixes it with the model's prediction without retrieval: p = (1 - w) p_off + w p_copier
where the copier found something, p_off elsewhere. The weight w is chosen on training data. A model
that has learned to use its neighbors must beat this baseline.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from data_retro.collator import IGNORED_LABEL
from modeling_retro.retrieval_points import last_point_number

WEIGHTS = torch.linspace(0, 0.98, 50)


def slots_read(
    input_ids: torch.Tensor,
    chunk_size: int,
    first_point: torch.Tensor | None = None,
    retrieval_stride: int | None = None,
) -> torch.Tensor:
    """Return the slot whose neighbors each position but the last reads, below 0 for none.

    The last token before a retrieval point is the first to read that point's neighbors.

    Args:
        input_ids: (B, T) int64, rows padded on the right.
        chunk_size: the model's.
        first_point: (B,) int64, each row's first point. Default: chunk_size.
        retrieval_stride: tokens between two points. Default: chunk_size.

    Returns:
        (B, T - 1) int64.
    """
    seen = torch.arange(1, input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
    first = chunk_size if first_point is None else first_point[:, None]
    return last_point_number(seen, first, retrieval_stride or chunk_size)


def copied_probability(
    input_ids: torch.Tensor,
    neighbor_ids: torch.Tensor,
    neighbor_attention_mask: torch.Tensor,
    chunk_size: int,
    first_point: torch.Tensor | None = None,
    retrieval_stride: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the copier's probability of each next token.

    Args:
        input_ids: (B, T) int64, rows padded on the right.
        neighbor_ids, neighbor_attention_mask: (B, C, k, r), the neighbors in each row's C slots.
        chunk_size, first_point, retrieval_stride: as for [`slots_read`].

    Returns:
        probability (B, T - 1) of token i + 1.
        found (B, T - 1) bool: True where the copier found its last tokens.
    """
    num_slots = neighbor_ids.shape[1]
    if not num_slots:
        nothing = torch.zeros_like(input_ids[:, 1:], dtype=torch.bool)
        return nothing.float(), nothing
    slots = slots_read(input_ids, chunk_size, first_point, retrieval_stride)
    in_reach = (slots >= 0) & (slots < num_slots)
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    ids = neighbor_ids.masked_fill(~neighbor_attention_mask.bool(), -1)
    ids = ids[rows, slots.clamp(0, num_slots - 1)]  # (B, T - 1, k, r)
    last = input_ids[:, :-1, None, None]
    before = F.pad(input_ids[:, :-2], (1, 0), value=-1)[..., None, None]
    places = copied_places(ids, last, before).flatten(2) & in_reach[..., None]
    right = places & (ids == input_ids[:, 1:, None, None]).flatten(2)
    count = places.sum(-1)
    return right.sum(-1) / count.clamp(min=1), count > 0


def copied_places(ids: torch.Tensor, last: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return True for the neighbors' tokens that the copier predicts: they follow the last tokens.

    Args:
        ids: (..., k, r) the neighbors' tokens, -1 for padding.
        last, before: (..., 1, 1) a position's token and the one before it, -1 where there is none.

    Returns:
        (..., k, r) bool.
    """
    one = (F.pad(ids[..., :-1], (1, 0), value=-1) == last) & (ids >= 0)
    two = one & (before >= 0) & (F.pad(ids[..., :-2], (2, 0), value=-1) == before)
    return torch.where(two.flatten(-2).any(-1)[..., None, None], two, one)


def mixture_nats(off_nats: torch.Tensor, copied: torch.Tensor, found: torch.Tensor, weight: float) -> torch.Tensor:
    """Compute the nats of each token under the mixture.

    Args:
        off_nats: nats of the model without retrieval.
        copied, found: see [`copied_probability`]; all three have one shape.
        weight: the copier's, below 1.
    """
    mixed = torch.logaddexp(math.log1p(-weight) - off_nats, (weight * copied).log())
    return torch.where(found, -mixed, off_nats)


@torch.no_grad()
def weight_nats(
    model: torch.nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    chunk_size: int,
    device: torch.device,
    retrieval_stride: int | None = None,
) -> torch.Tensor:
    """Sum the nats of all batches under each of `WEIGHTS`.

    Args:
        chunk_size, retrieval_stride: as for [`slots_read`].

    Returns:
        (len(WEIGHTS),) on `device`.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(len(WEIGHTS), device=device)
    for batch in batches:
        if "neighbor_ids" not in batch:
            continue
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        ids, mask = batch.pop("neighbor_ids"), batch.pop("neighbor_attention_mask")
        batch.pop("neighbor_scores", None)
        logits = model(**batch, use_retrieval=False).logits[:, :-1]
        nats = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        copied, found = copied_probability(
            batch["input_ids"], ids, mask, chunk_size, batch.get("first_point"), retrieval_stride
        )
        for place, weight in enumerate(WEIGHTS.tolist()):
            total[place] += (mixture_nats(nats, copied, found, weight) * (labels != IGNORED_LABEL)).sum()
    model.train(was_training)
    return total


def best_weight(nats: torch.Tensor) -> float | None:
    """Return the weight with the least of [`weight_nats`], or None if no batch had neighbors."""
    return float(WEIGHTS[int(nats.argmin())]) if nats.any() else None
