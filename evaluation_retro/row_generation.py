"""Greedy generation with RETRO, with RETRO and in-context retrieval, and with the copy baseline.

Together with [`evaluation_retro.rival_generation`] these generate with every row of the comparison.
All generate exactly n tokens: no token ends a text.

Shapes: B prompts of T tokens, n new tokens, k neighbors of r tokens, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from modeling_retro import RetroForCausalLM
from modeling_retro.neighbor_inputs import NeighborInputs
from retrieval import MilvusRetriever, Neighbors

from .copy_baseline import copied_places
from .in_context import Prompt, neighbor_tokens
from .retro_in_context import one_point_each
from .rival_generation import GREEDY, Texts, continue_greedily, cut_prompt, left_padded, write_in_strides


@contextmanager
def reading_from(model: RetroForCausalLM, retriever: MilvusRetriever) -> Iterator[None]:
    """Let a model read as many neighbors as a retriever finds, in this block."""
    before = model.config.num_neighbors, model.retriever
    model.config.num_neighbors = retriever.num_neighbors
    model.set_retriever(retriever)
    try:
        yield
    finally:
        model.config.num_neighbors = before[0]
        model.set_retriever(before[1])


def generate_retro(
    model: RetroForCausalLM,
    retriever: MilvusRetriever,
    input_ids: torch.Tensor,
    new_tokens: int,
    stride: int,
    drafts: bool = False,
) -> torch.Tensor:
    """Generate with RETRO.

    Args:
        model: RETRO, in evaluation mode.
        retriever: finds the neighbors.
        input_ids: (B, T) int64, prompts without padding.
        new_tokens: n.
        stride: tokens between two searches.
        drafts: draft from the neighbors, for one prompt.

    Returns:
        (B, n) int64, the new tokens.
    """
    with reading_from(model, retriever):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            retrieval_stride=stride,
            draft_from_neighbors=drafts,
            **GREEDY,
        )
    return output[:, input_ids.shape[1] :]


def generate_retro_in_context(
    model: RetroForCausalLM,
    retriever: MilvusRetriever,
    input_ids: torch.Tensor,
    new_tokens: int,
    *,
    stride: int,
    separator: Sequence[int] = (),
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Generate with RETRO, and with the neighbors in front of the text, too.

    As in [`evaluation_retro.retro_in_context`], RETRO has one retrieval point, the prompt's end.

    Args:
        model, retriever, input_ids, new_tokens, stride: as for [`generate_retro`].
        separator, max_tokens: as for [`evaluation_retro.rival_generation.generate_in_context`].

    Returns:
        (B, n) int64, the new tokens.

    Raises:
        ValueError: the neighbors leave no room in the window for the new tokens.
    """
    size = model.config.chunk_size

    def write(texts: Texts, found: Neighbors, count: int) -> torch.Tensor:
        in_front = [
            neighbor_tokens(ids, mask, separator) for ids, mask in zip(found.ids, found.attention_mask, strict=True)
        ]
        cut = [cut_prompt(before, text, count, max_tokens) for before, text in zip(in_front, texts, strict=True)]
        prompts = [
            Prompt(row, range(0), tokens, 0 if before else None, len(tokens) if before else None)
            for row, (tokens, before) in enumerate(zip(cut, in_front, strict=True))
        ]
        neighbors = NeighborInputs(*(part[:, None] for part in (found.ids, found.attention_mask, found.scores)))
        first_points, read = one_point_each(prompts, neighbors, size)
        ids, mask = left_padded(cut, model.device)
        given: dict[str, Any] = {**read.to(model.device).as_arguments(), **GREEDY}
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            first_point=first_points.to(model.device),
            retrieval_stride=size,  # the next point would lie behind the last new token
            max_new_tokens=count,
            **given,
        )
        return output[:, ids.shape[1] :]

    with reading_from(model, retriever):
        return write_in_strides(write, retriever, input_ids.tolist(), new_tokens, stride, None)


def generate_copying(
    decoder: PreTrainedModel,
    retriever: MilvusRetriever,
    weight: float,
    input_ids: torch.Tensor,
    new_tokens: int,
    stride: int,
) -> torch.Tensor:
    """Generate with the copy baseline; see [`evaluation_retro.copy_baseline`].

    Args:
        decoder: a causal language model of transformers, in evaluation mode.
        weight: the copier's, below 1.
        retriever, input_ids, new_tokens, stride: as for [`generate_retro`].

    Returns:
        (B, n) int64, the new tokens.
    """
    copier = _Copier(retriever, weight, input_ids.shape[1], stride)
    return continue_greedily(decoder, input_ids.tolist(), new_tokens, copier)


class _Copier(LogitsProcessor):
    """Mixes the decoder's distribution with the tokens that follow the last ones in the neighbors.

    Args:
        retriever: asked at the prompt's end, and after every `stride` new tokens.
        weight: the copier's share.
        prompt: tokens of the prompt.
        stride: new tokens between two searches.
    """

    def __init__(self, retriever: MilvusRetriever, weight: float, prompt: int, stride: int) -> None:
        self.retriever, self.weight, self.prompt, self.stride = retriever, weight, prompt, stride
        self.ids = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities (B, V), given logits of that shape."""
        if (input_ids.shape[1] - self.prompt) % self.stride == 0:
            found = self.retriever.retrieve(input_ids[:, -self.retriever.chunk_size :].tolist())
            self.ids = found.ids.masked_fill(~found.attention_mask.bool(), -1).to(scores.device)
        last, before = (input_ids[:, place, None, None, None] for place in (-1, -2))
        places = copied_places(self.ids[:, None], last, before).flatten(1)
        log_probs = scores.float().log_softmax(-1)
        votes = torch.zeros_like(log_probs).scatter_add_(1, self.ids.flatten(1).clamp(min=0), places.float())
        copied = votes / places.sum(1, keepdim=True).clamp(min=1)
        mixed = torch.logaddexp(math.log1p(-self.weight) + log_probs, (self.weight * copied).log())
        return torch.where(places.any(1, keepdim=True), mixed, log_probs)
