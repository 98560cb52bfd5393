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

WEIGHTS = torch.linspace(0, 0.98, 50)


def copied_probability(
    input_ids: torch.Tensor, neighbor_ids: torch.Tensor, neighbor_attention_mask: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the copier's probability of each next token.

    Args:
        input_ids: (B, T) int64, rows padded on the right.
        neighbor_ids, neighbor_attention_mask: (B, C, k, r), the neighbors of each row's C chunks.

    Returns:
        probability (B, T - 1) of token i + 1.
        found (B, T - 1) bool: True where the copier found its last tokens.
    """
    length, chunks = input_ids.shape[1], neighbor_ids.shape[1]
    if not chunks:
        nothing = torch.zeros_like(input_ids[:, 1:], dtype=torch.bool)
        return nothing.float(), nothing
    # the last token of a chunk is the first to read its neighbors
    chunk = torch.arange(1, length, device=input_ids.device) // chunk_size - 1
    in_reach = (chunk >= 0) & (chunk < chunks)
    read = chunk.clamp(0, chunks - 1)
    ids = neighbor_ids.masked_fill(~neighbor_attention_mask.bool(), -1)[:, read]  # (B, T - 1, k, r)
    last = input_ids[:, :-1, None, None]
    before = F.pad(input_ids[:, :-2], (1, 0), value=-1)[..., None, None]
    one = (F.pad(ids[..., :-1], (1, 0), value=-1) == last) & (ids >= 0)
    two = one & (before >= 0) & (F.pad(ids[..., :-2], (2, 0), value=-1) == before)
    places = torch.where(two.flatten(2).any(-1)[..., None, None], two, one).flatten(2) & in_reach[:, None]
    right = places & (ids == input_ids[:, 1:, None, None]).flatten(2)
    count = places.sum(-1)
    return right.sum(-1) / count.clamp(min=1), count > 0


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
    model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], chunk_size: int, device: torch.device
) -> torch.Tensor:
    """Sum the nats of all batches under each of `WEIGHTS`.

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
        copied, found = copied_probability(batch["input_ids"], ids, mask, chunk_size)
        for place, weight in enumerate(WEIGHTS.tolist()):
            total[place] += (mixture_nats(nats, copied, found, weight) * (labels != IGNORED_LABEL)).sum()
    model.train(was_training)
    return total


def best_weight(nats: torch.Tensor) -> float | None:
    """Return the weight with the least of [`weight_nats`], or None if no batch had neighbors."""
    return float(WEIGHTS[int(nats.argmin())]) if nats.any() else None
