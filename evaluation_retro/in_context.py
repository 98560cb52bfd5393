"""In-context retrieval: the neighbors stand in front of the text (Ram et al., 2023).

The rival that needs no training and no new parameters. At each retrieval point the decoder's prompt
becomes the point's neighbors, then the text so far, and the tokens up to the next point are
predicted after it. The decoder reads hundreds of tokens more for each chunk, again at each point.

Shapes: B rows of T tokens, C slots, each for one retrieval point, k neighbors of r tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from .copy_baseline import slots_read

PROMPTS = 2  # that the decoder reads at a time

Progress = Callable[[Sequence[int]], Iterable[int]]  # goes through numbers of batches, and may show a bar


@dataclass
class Prompt:
    """The neighbors of one retrieval point, then the text up to the next point.

    Attributes:
        row: the text's row.
        positions: of the text, whose next tokens are predicted.
        tokens: the neighbors, then the text up to the last of these positions.
        slot: the slot whose neighbors stand in the prompt; None if it has no neighbors.
        point: how many of the tokens stand before the retrieval point; None without neighbors.
    """

    row: int
    positions: range
    tokens: list[int]
    slot: int | None = None
    point: int | None = None

    @property
    def columns(self) -> range:
        """The places of `positions` among the tokens."""
        return range(len(self.tokens) - len(self.positions), len(self.tokens))


def in_context_prompts(
    input_ids: torch.Tensor,
    neighbor_ids: torch.Tensor,
    neighbor_attention_mask: torch.Tensor,
    chunk_size: int,
    first_point: torch.Tensor | None = None,
    retrieval_stride: int | None = None,
    separator: Sequence[int] = (),
    max_tokens: int | None = None,
    first: int = 0,
) -> list[Prompt]:
    """Return the prompts in which every token but each row's first is predicted once.

    The best neighbor stands next to the text. Positions before the first point, and those of a
    point without neighbors, have the text alone.

    Args:
        input_ids: (B, T) int64, rows padded on the right.
        neighbor_ids, neighbor_attention_mask: (B, C, k, r), the neighbors in each row's C slots,
            the best one first.
        chunk_size: the size that the points were placed with.
        first_point: (B,) int64, each row's first point. Default: chunk_size.
        retrieval_stride: tokens between two points. Default: chunk_size.
        separator: tokens after each neighbor.
        max_tokens: the window. Text at the beginning is cut off so that neighbors and text fit.
            Default: nothing is cut off.
        first: the first position whose next token is predicted. Later ones follow to the end.

    Raises:
        ValueError: the neighbors of a point leave no room in the window for the tokens before the
            predicted ones.
    """
    prompts, num_slots = [], neighbor_ids.shape[1]
    slots = slots_read(input_ids, chunk_size, first_point, retrieval_stride)
    for row, slots_of_row in enumerate(slots.tolist()):
        for slot, group in groupby(range(first, len(slots_of_row)), key=slots_of_row.__getitem__):
            positions = list(group)
            before: list[int] = []
            if 0 <= slot < num_slots:
                before = neighbor_tokens(neighbor_ids[row, slot], neighbor_attention_mask[row, slot], separator)
            text = input_ids[row, : positions[-1] + 1].tolist()
            # the token before the point stays, too; it is the first to read the point's neighbors
            least = len(text) - slots_of_row.index(slot) if before else len(positions)
            tokens = with_neighbors(before, text, max_tokens, least)
            prompt = Prompt(row, range(positions[0], positions[-1] + 1), tokens)
            if before:
                prompt.slot, prompt.point = slot, len(tokens) - least + 1
            prompts.append(prompt)
    return prompts


def neighbor_tokens(ids: torch.Tensor, mask: torch.Tensor, separator: Sequence[int] = ()) -> list[int]:
    """Return the tokens of a point's neighbors, the best one last, each followed by the separator.

    Args:
        ids, mask: (k, r), the best neighbor first. A neighbor that is masked out is left out.
        separator: tokens after each neighbor.
    """
    tokens: list[int] = []
    for neighbor, is_real in reversed([*zip(ids, mask.bool(), strict=True)]):
        if is_real.any():
            tokens += [*neighbor[is_real].tolist(), *separator]
    return tokens


def with_neighbors(before: list[int], text: list[int], max_tokens: int | None, least: int) -> list[int]:
    """Return neighbors and text, with the text's beginning cut off if they do not fit.

    Args:
        before: the neighbors' tokens.
        text: the text's tokens.
        max_tokens: the window; None cuts nothing off.
        least: tokens at the text's end that must stay.

    Raises:
        ValueError: the neighbors leave no room for these.
    """
    if max_tokens is None:
        return before + text
    room = max_tokens - len(before)
    if room < least:
        raise ValueError(
            f"The neighbors have {len(before)} tokens, and {least} tokens of text must follow them, but the window "
            f"has {max_tokens}. Set a larger max_tokens, fewer neighbors or a smaller stride."
        )
    return before + text[-room:]


@torch.no_grad()
def in_context_nats(
    decoder: Callable[..., Any],
    prompts: Iterable[Prompt],
    input_ids: torch.Tensor,
    progress: Progress = iter,
) -> torch.Tensor:
    """Compute the nats of the tokens that follow the prompts' positions.

    Args:
        decoder: a causal language model of transformers, in evaluation mode, on the device of
            `input_ids`. It takes input_ids and logits_to_keep.
        prompts: those of [`in_context_prompts`], or some of them.
        input_ids: (B, T) int64, from which the prompts were made.
        progress: goes through the numbers of batches, and may show a bar.

    Returns:
        (B, T − 1) float32, nan where no prompt predicts.
    """

    def logits_of(batch: list[Prompt], padded: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return decoder(input_ids=padded, logits_to_keep=keep, use_cache=False).logits

    return prompted_nats(logits_of, prompts, input_ids, progress)


def prompted_nats(
    logits_of: Callable[[list[Prompt], torch.Tensor, torch.Tensor], torch.Tensor],
    prompts: Iterable[Prompt],
    input_ids: torch.Tensor,
    progress: Progress = iter,
) -> torch.Tensor:
    """Compute the nats of the tokens that follow the prompts' positions, with any model.

    Args:
        logits_of: returns the logits (n, columns, vocabulary) of n prompts, given the prompts,
            their tokens (n, length) padded on the right with 0, and the columns to keep.
        prompts, input_ids, progress: as for [`in_context_nats`], which says what is returned.
    """
    by_length = sorted(prompts, key=lambda prompt: len(prompt.tokens))
    nats = torch.full_like(input_ids[:, 1:], torch.nan, dtype=torch.float32)
    for start in progress(range(0, len(by_length), PROMPTS)):
        batch = by_length[start : start + PROMPTS]
        # a causal decoder does not see padding on the right
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt.tokens) for prompt in batch], batch_first=True)
        kept = sorted({column for prompt in batch for column in prompt.columns})
        logits = logits_of(batch, padded.to(input_ids.device), torch.tensor(kept, device=input_ids.device))
        for prompt, its_logits in zip(batch, logits, strict=True):
            place = kept.index(prompt.columns.start)
            predicted = its_logits[place : place + len(prompt.positions)].float()
            here = slice(prompt.positions.start, prompt.positions.stop)
            targets = input_ids[prompt.row, 1:][here]
            nats[prompt.row, here] = F.cross_entropy(predicted, targets, reduction="none")
    return nats
