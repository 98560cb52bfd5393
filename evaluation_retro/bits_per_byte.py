"""Held-out loss and bits-per-byte with a chunk's own neighbors, with none, with another sequence's, and of copying alone.

Measured are the tokens that a sequence predicts: all but its first. The loss is their mean negative log-likelihood in
nats. Bits-per-byte is the sum of those nats / ln 2 / the UTF-8 bytes of those tokens' text. End-of-text costs nats and is
no text, so it adds to the nats and not to the bytes; any other special token likewise.

The same tokens are measured under each condition:
    on        every chunk reads its own neighbors
    off       no chunk reads any (`use_retrieval=False`): the decoder alone
    shuffled  every chunk reads the neighbors of a chunk in another sequence: as much text, but the wrong one
    copy_baseline  as off, mixed with an n-gram copier over the chunk's own neighbors: see [`copy_baseline`]
on beating off may only show that more parameters were trained; on beating shuffled shows that what the neighbors say
is used, on beating copy_baseline that more is read than can be looked up. Each difference comes with its standard error over sequences, paired, so that it can be judged against noise.
Sequences that were cut from one long document are not independent; their standard error is somewhat too small.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_retro.collator import NEIGHBOR_FIELDS

from .copy_baseline import copied_probability, mixture_nats

CONDITIONS = ("on", "off", "shuffled", "copy_baseline")


def byte_lengths(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """UTF-8 bytes of text that each token stands for, (vocabulary,) int64; 0 for special tokens."""
    vocabulary, added, special = tokenizer.get_vocab(), tokenizer.get_added_vocab(), set(tokenizer.all_special_ids)
    lengths = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.long)
    byte_level = isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None), ByteLevel)
    for token, index in vocabulary.items():
        if index in special:
            continue
        if token in added:
            lengths[index] = len(token.encode())
        elif byte_level:
            lengths[index] = len(token)  # one character a byte, also where a token cuts a character in two
        else:
            # what a second copy adds: decoding one token alone may lose its leading space
            once, twice = (tokenizer.decode([index] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
            lengths[index] = len(twice.encode()) - len(once.encode())
    return lengths


def shuffle_neighbors(neighbors: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Give every chunk that has neighbors those of another chunk of the batch; no chunk keeps its own.

    The chunks are rotated, as a ring, so far that each gets the neighbors of another row. Where one row holds more than
    half of the chunks, some stay within their row; where there is only one chunk, its neighbors are masked out.

    Args:
        neighbors: neighbor_attention_mask (B, C, k, r), and other tensors (B, C, …) that move with it.
        seed: chooses the rotation among those possible; the same seed and batch give the same.
    """
    mask = neighbors["neighbor_attention_mask"]
    filled = mask.flatten(2).any(-1)  # (B, C)
    chunks, longest = int(filled.sum()), int(filled.sum(1).max())
    if chunks < 2:
        return neighbors | {"neighbor_attention_mask": torch.zeros_like(mask)}
    least, most = (longest, chunks - longest) if chunks >= 2 * longest else (1, chunks - 1)
    shift = int(torch.randint(least, most + 1, (), generator=torch.Generator().manual_seed(seed)))
    shuffled = {name: tensor.clone() for name, tensor in neighbors.items()}
    for tensor in shuffled.values():
        tensor[filled] = tensor[filled].roll(shift, 0)
    return shuffled


@torch.no_grad()
def sequence_nats(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    chunk_size: int,
    bytes_of: torch.Tensor,
    copy_weight: float | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure one batch, sequence by sequence, under each condition; without neighbors in it, under "off" alone.

    Args:
        model: a RETRO model, wrapped or not.
        batch: what [`RetroDataCollator`] returns: rows padded on the right.
        chunk_size: the model's; a position from chunk_size - 1 on is in reach of neighbors.
        bytes_of: what [`byte_lengths`] returns.
        copy_weight: of the copier in the copy baseline, chosen on training data ([`copy_baseline.best_weight`]); None leaves
            that condition out.
        seed: of the shuffle.

    Returns:
        nats (B, conditions, 2): summed over all of a sequence's predicted tokens, and over those in reach.
        sizes (B, 2, 2) int64: [all, in reach] x [tokens, bytes].
    """
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:]  # (B, T - 1): position i predicts token i + 1
    neighbors = {name: batch.pop(name) for name in NEIGHBOR_FIELDS if name in batch}
    conditions: list[dict] = [{"use_retrieval": False}]
    if neighbors:
        conditions = [neighbors, *conditions, shuffle_neighbors(neighbors, seed)]  # the order of CONDITIONS

    predicted = labels != -100
    in_reach = torch.arange(labels.shape[1], device=labels.device) >= chunk_size - 1
    regions = torch.stack([predicted, predicted & in_reach], 1)  # (B, 2, T - 1)
    bytes_per_token = bytes_of.to(labels.device)[labels.clamp(min=0)]
    sizes = torch.stack([regions.sum(-1), (regions * bytes_per_token[:, None]).sum(-1)], -1)
    nats = []
    for condition in conditions:
        logits = model(**batch, **condition).logits[:, :-1]
        token_nats = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # 0 at label -100
        nats.append((token_nats[:, None] * regions).sum(-1))
        if "use_retrieval" in condition:
            off_nats = token_nats
    if neighbors and copy_weight is not None:
        copied = copied_probability(batch["input_ids"], *list(neighbors.values())[:2], chunk_size)
        nats.append((mixture_nats(off_nats, *copied, copy_weight)[:, None] * regions).sum(-1))
    return torch.stack(nats, 1), sizes


@dataclass
class Evaluation:
    """The measurements of N sequences, one by one.

    Attributes:
        nats: (N, conditions, 2) float64; [all, in reach] of neighbors. Conditions as CONDITIONS, the last of which may be
            missing, or "off" alone.
        sizes: (N, 2, 2); [all, in reach] x [tokens, bytes].
    """

    nats: np.ndarray
    sizes: np.ndarray

    def __post_init__(self):
        self.nats = np.asarray(self.nats, dtype=np.float64)
        self.conditions = CONDITIONS[: self.nats.shape[1]] if self.nats.shape[1] > 1 else ("off",)

    def of(self, condition: str, in_reach: bool = False) -> np.ndarray:
        """Nats of each sequence under a condition, (N,)."""
        return self.nats[:, self.conditions.index(condition), int(in_reach)]

    def loss(self, condition: str, in_reach: bool = False) -> float:
        """Nats per token; nan if no token was measured."""
        return _ratio(self.of(condition, in_reach).sum(), self.sizes[:, int(in_reach), 0].sum())

    def bits_per_byte(self, condition: str, in_reach: bool = False) -> float:
        """Bits per UTF-8 byte of text; nan if there was no text."""
        return _ratio(self.of(condition, in_reach).sum() / math.log(2), self.sizes[:, int(in_reach), 1].sum())

    def gain(self, over: np.ndarray | str, condition: str = "on") -> tuple[float, float]:
        """How many bits per byte `condition` saves over another condition, or another model, and the standard error.

        Args:
            over: a condition's name, or nats of the same sequences (N,), such as another evaluation's `of("off")`.
        """
        other = self.of(over) if isinstance(over, str) else over
        return paired_gain(other - self.of(condition), self.sizes[:, 0, 1])

    def metrics(self) -> dict[str, float]:
        """Everything as flat numbers: the first condition under plain names (`loss`), the others as `off_loss` …"""
        numbers = {}
        for condition in self.conditions:
            prefix = "" if condition == self.conditions[0] else f"{condition}_"
            for region, in_reach in (("", False), ("_in_reach", True)):
                numbers[f"{prefix}loss{region}"] = self.loss(condition, in_reach)
                numbers[f"{prefix}bits_per_byte{region}"] = self.bits_per_byte(condition, in_reach)
        for other in self.conditions[1:]:
            numbers[f"gain_over_{other}"], numbers[f"gain_over_{other}_stderr"] = self.gain(other)
        return numbers


def paired_gain(saved_nats: np.ndarray, text_bytes: np.ndarray) -> tuple[float, float]:
    """Bits per byte saved, and the standard error of that ratio over sequences (nan for fewer than two).

    Args:
        saved_nats: (N,), the difference of two measurements of the same sequence.
        text_bytes: (N,), bytes of each sequence.
    """
    count, total = len(saved_nats), text_bytes.sum()
    gain = _ratio(saved_nats.sum(), total)
    if count < 2 or not total:
        return gain / math.log(2), math.nan
    deviations = saved_nats - gain * text_bytes  # the ratio estimator's: long sequences weigh more
    stderr = math.sqrt(count / (count - 1) * (deviations**2).sum()) / total
    return gain / math.log(2), stderr / math.log(2)


def evaluate(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    bytes_of: torch.Tensor,
    copy_weight: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure a RETRO model on batches from [`RetroDataCollator`], moved to the model's device; `copy_weight` as for
    [`sequence_nats`].

    Batches should mix documents (shuffle the sequences once, with a fixed seed) and hold two sequences or more: the
    shuffled neighbors come from the same batch.

    Raises:
        ValueError: there were no batches.
    """
    was_training = model.training
    model.eval()
    measured = []
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        nats, sizes = sequence_nats(model, batch, model.config.chunk_size, bytes_of, copy_weight, seed)
        measured.append((nats.cpu(), sizes.cpu()))
    model.train(was_training)
    if not measured:
        raise ValueError("There is nothing to evaluate: no batches.")
    nats, sizes = (torch.cat(parts).numpy() for parts in zip(*measured, strict=True))
    return Evaluation(nats, sizes)


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else math.nan
