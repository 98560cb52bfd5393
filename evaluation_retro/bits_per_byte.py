"""Measure held-out loss and bits per byte with neighbors on, off and shuffled, and for a copier.

All tokens of a sequence but its first are predicted and measured. The loss is their mean negative
log-likelihood in nats. Bits per byte are the sum of those nats, divided by ln 2 and by the UTF-8
bytes of the tokens' text. Special tokens such as end-of-text cost nats but have no bytes.

The same tokens are measured under each condition:

    on             every position reads the neighbors of its retrieval point
    off            no position reads any (`use_retrieval=False`): the decoder alone
    shuffled       every position reads the neighbors of a point in another sequence
    copy_baseline  off, mixed with an n-gram copier over the neighbors (see `copy_baseline.py`)

If "on" beats "off", the extra trained parameters may be the only cause. If "on" beats "shuffled",
the model uses the content of its neighbors. If "on" beats "copy_baseline", the model learned more
than an n-gram lookup can find.

Each difference comes with its standard error, paired over sequences. Sequences cut from one long
document are not independent, so their standard error is somewhat too small.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_retro.collator import IGNORED_LABEL, NEIGHBOR_FIELDS
from retrieval.detokenization import token_bytes

from .copy_baseline import copied_probability, mixture_nats, slots_read

CONDITIONS = ("on", "off", "shuffled", "copy_baseline")


def byte_lengths(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Count the UTF-8 bytes of each token's text; special tokens have 0.

    A space that the tokenizer puts before each text counts, too.

    Returns:
        (vocabulary,) int64.

    Raises:
        ValueError: the tokenizer's tokens do not tell where the text has spaces.
    """
    pieces = token_bytes(tokenizer).pieces
    lengths = torch.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=torch.long)
    for index, piece in pieces.items():
        lengths[index] = len(piece)
    lengths[tokenizer.all_special_ids] = 0
    return lengths


def shuffle_neighbors(neighbors: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Give every slot that has neighbors those of another slot of the batch.

    The neighbors are rotated over the batch's slots, far enough that each slot gets those of
    another row. If one row holds more than half of the slots, some stay within that row. A single
    slot has its neighbors masked out.

    Args:
        neighbors: neighbor_attention_mask (B, C, k, r) and other tensors (B, C, …) to move with it.
        seed: chooses among the possible rotations. Equal seeds and batches give equal results.
    """
    mask = neighbors["neighbor_attention_mask"]
    filled = mask.flatten(2).any(-1)  # (B, C)
    slots, longest = int(filled.sum()), int(filled.sum(1).max())
    if slots < 2:
        return neighbors | {"neighbor_attention_mask": torch.zeros_like(mask)}
    least, most = (longest, slots - longest) if slots >= 2 * longest else (1, slots - 1)
    shift = int(torch.randint(least, most + 1, (), generator=torch.Generator().manual_seed(seed)))
    shuffled = {name: tensor.clone() for name, tensor in neighbors.items()}
    for tensor in shuffled.values():
        tensor[filled] = tensor[filled].roll(shift, 0)
    return shuffled


@torch.no_grad()
def sequence_nats(
    model: Callable[..., Any],
    batch: dict[str, torch.Tensor],
    chunk_size: int,
    token_bytes: torch.Tensor,
    copy_weight: float | None = None,
    seed: int = 0,
    retrieval_stride: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure each sequence of a batch under each condition.

    A batch without neighbors is measured under "off" only.

    Args:
        model: a RETRO model, wrapped or not.
        batch: the output of [`RetroDataCollator`], rows padded on the right. The positions from the
            last one before a row's first point on are in reach of neighbors.
        chunk_size: the model's, the first point of rows without one of their own.
        token_bytes: the output of [`byte_lengths`].
        copy_weight: the copier's weight in the copy baseline, chosen on training data by
            [`copy_baseline.best_weight`]. None leaves that condition out.
        seed: for [`shuffle_neighbors`].
        retrieval_stride: the model's. Default: chunk_size.

    Returns:
        nats (B, conditions, 2): summed over a sequence's predicted tokens: [all, in reach].
        sizes (B, 2, 2) int64: [all, in reach] x [tokens, bytes].
    """
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:]  # (B, T - 1): position i predicts token i + 1
    neighbors = {name: batch.pop(name) for name in NEIGHBOR_FIELDS if name in batch}
    off: dict[str, Any] = {"use_retrieval": False}
    conditions = [neighbors, off, shuffle_neighbors(neighbors, seed)] if neighbors else [off]  # as in CONDITIONS

    predicted = labels != IGNORED_LABEL
    grid = (chunk_size, batch.get("first_point"), retrieval_stride)
    in_reach = slots_read(batch["input_ids"], *grid) >= 0
    regions = torch.stack([predicted, predicted & in_reach], 1)  # (B, 2, T - 1)
    bytes_per_token = token_bytes.to(labels.device)[labels.clamp(min=0)]
    sizes = torch.stack([regions.sum(-1), (regions * bytes_per_token[:, None]).sum(-1)], -1)
    nats = []
    for condition in conditions:
        logits: torch.Tensor = model(**batch, **condition).logits[:, :-1]
        token_nats = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # 0 at label -100
        nats.append((token_nats[:, None] * regions).sum(-1))
        if condition is off:
            off_nats = token_nats
    if neighbors and copy_weight is not None:
        ids, mask = neighbors["neighbor_ids"], neighbors["neighbor_attention_mask"]
        copied = copied_probability(batch["input_ids"], ids, mask, *grid)
        nats.append((mixture_nats(off_nats, *copied, copy_weight)[:, None] * regions).sum(-1))
    return torch.stack(nats, 1), sizes


@dataclass
class Evaluation:
    """The measurements of N sequences.

    Attributes:
        nats: (N, conditions, 2) float64; the last axis is [all, in reach] of neighbors.
        sizes: (N, 2, 2) integers: [all, in reach] x [tokens, bytes].
        conditions: `CONDITIONS`, with or without the copy baseline, or "off" alone.
    """

    nats: np.ndarray
    sizes: np.ndarray

    def __post_init__(self) -> None:
        self.nats = np.asarray(self.nats, dtype=np.float64)
        self.conditions = CONDITIONS[: self.nats.shape[1]] if self.nats.shape[1] > 1 else ("off",)

    def condition_nats(self, condition: str, in_reach: bool = False) -> np.ndarray:
        """Return the nats of each sequence under a condition, (N,)."""
        return self.nats[:, self.conditions.index(condition), int(in_reach)]

    def loss(self, condition: str, in_reach: bool = False) -> float:
        """Return nats per token, or nan if no token was measured."""
        return _ratio(self.condition_nats(condition, in_reach).sum(), self.sizes[:, int(in_reach), 0].sum())

    def bits_per_byte(self, condition: str, in_reach: bool = False) -> float:
        """Return bits per UTF-8 byte of text, or nan if there was no text."""
        nats = self.condition_nats(condition, in_reach).sum()
        return _ratio(nats / math.log(2), self.sizes[:, int(in_reach), 1].sum())

    def gain(self, over: np.ndarray | str, condition: str = "on") -> tuple[float, float]:
        """Return the bits per byte that `condition` saves over another one, and the standard error.

        Args:
            over: a condition, or nats (N,) that another model needs for the same sequences:
                its `condition_nats("off")`.
        """
        other = self.condition_nats(over) if isinstance(over, str) else over
        return paired_gain(other - self.condition_nats(condition), self.sizes[:, 0, 1])

    def metrics(self) -> dict[str, float]:
        """Return all numbers by name: `loss` of the first condition, `off_loss` … of the others."""
        numbers: dict[str, float] = {}
        for condition in self.conditions:
            prefix = "" if condition == self.conditions[0] else f"{condition}_"
            for region, in_reach in (("", False), ("_in_reach", True)):
                numbers[f"{prefix}loss{region}"] = self.loss(condition, in_reach)
                numbers[f"{prefix}bits_per_byte{region}"] = self.bits_per_byte(condition, in_reach)
        for other in self.conditions[1:]:
            numbers[f"gain_over_{other}"], numbers[f"gain_over_{other}_stderr"] = self.gain(other)
        return numbers


def paired_gain(saved_nats: np.ndarray, text_bytes: np.ndarray) -> tuple[float, float]:
    """Return the bits per byte saved and their standard error over sequences.

    The standard error is nan for fewer than two sequences.

    Args:
        saved_nats: (N,), the difference between two measurements of each sequence.
        text_bytes: (N,), the bytes of each sequence.
    """
    count, total = len(saved_nats), text_bytes.sum()
    gain = _ratio(saved_nats.sum(), total)
    if count < 2 or not total:
        return gain / math.log(2), math.nan
    deviations = saved_nats - gain * text_bytes  # the ratio estimator: long sequences weigh more
    stderr = math.sqrt(count / (count - 1) * (deviations**2).sum()) / total
    return gain / math.log(2), stderr / math.log(2)


def evaluate(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    token_bytes: torch.Tensor,
    copy_weight: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure a RETRO model on batches of [`RetroDataCollator`], moved to the model's device.

    The shuffled neighbors come from the same batch. A batch should therefore hold two sequences or
    more and mix documents: shuffle the sequences once, with a fixed seed.

    Args:
        token_bytes, copy_weight, seed: see [`sequence_nats`].

    Raises:
        ValueError: there are no batches.
    """
    was_training = model.training
    model.eval()
    all_nats, all_sizes = [], []
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        config = model.config
        nats, sizes = sequence_nats(
            model, batch, config.chunk_size, token_bytes, copy_weight, seed, config.retrieval_stride
        )
        all_nats.append(nats.cpu())
        all_sizes.append(sizes.cpu())
    model.train(was_training)
    if not all_nats:
        raise ValueError("There is nothing to evaluate: the data has no batches.")
    return Evaluation(torch.cat(all_nats).numpy(), torch.cat(all_sizes).numpy())


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else math.nan
