"""RETRO and in-context retrieval together: the neighbors are read, and stand in the prompt, too.

The prompts are those of [`evaluation_retro.in_context`]. In each, RETRO has one retrieval point,
the one whose neighbors stand in front of the text.
"""

from collections.abc import Iterable

import torch

from modeling_retro import RetroForCausalLM
from modeling_retro.neighbor_inputs import NeighborInputs
from modeling_retro.retrieval_points import aligned_first_point

from .in_context import Progress, Prompt, prompted_nats


@torch.no_grad()
def retro_in_context_nats(
    model: RetroForCausalLM,
    prompts: Iterable[Prompt],
    neighbors: NeighborInputs,
    input_ids: torch.Tensor,
    progress: Progress = iter,
) -> torch.Tensor:
    """Compute RETRO's nats of the tokens that follow the prompts' positions.

    A prompt without neighbors is read without retrieval.

    Args:
        model: RETRO, in evaluation mode, on the device of `input_ids`.
        prompts: those of [`evaluation_retro.in_context.in_context_prompts`], or some of them.
        neighbors: what RETRO reads, in the slots that the prompts name. They need not be as many as
            stand in the prompts.
        input_ids: (B, T) int64, from which the prompts were made.
        progress: goes through the numbers of batches, and may show a bar.

    Returns:
        (B, T − 1) float32, nan where no prompt predicts.
    """

    def logits_of(batch: list[Prompt], padded: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([len(prompt.tokens) for prompt in batch], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        first_points, read = one_point_each(batch, neighbors, model.config.chunk_size)
        return model(
            input_ids=padded,
            attention_mask=mask.long(),
            first_point=first_points.to(padded.device),
            retrieval_stride=model.config.chunk_size,
            logits_to_keep=keep,
            use_retrieval=any(prompt.slot is not None for prompt in batch),
            use_cache=False,
            **read.to(padded.device).as_arguments(),
        ).logits

    return prompted_nats(logits_of, prompts, input_ids, progress)


def one_point_each(
    batch: list[Prompt], neighbors: NeighborInputs, chunk_size: int
) -> tuple[torch.Tensor, NeighborInputs]:
    """Return the prompts' first points (n,), and neighbors in which one slot of each is not masked.

    The points of a prompt lie a chunk apart, so that the next one is never reached: prompts end
    before it.
    """
    points = [chunk_size if prompt.point is None else prompt.point for prompt in batch]
    first_points = [aligned_first_point(point, chunk_size, chunk_size) for point in points]
    slots = [(point - first) // chunk_size for point, first in zip(points, first_points, strict=True)]
    shape = (len(batch), max(slots) + 1, *neighbors.ids.shape[2:])
    ids, mask = neighbors.ids.new_zeros(shape), neighbors.mask.new_zeros(shape)
    scores = neighbors.scores.new_zeros(shape[:3])
    for number, (prompt, slot) in enumerate(zip(batch, slots, strict=True)):
        if prompt.slot is not None:
            ids[number, slot] = neighbors.ids[prompt.row, prompt.slot]
            mask[number, slot] = neighbors.mask[prompt.row, prompt.slot]
            scores[number, slot] = neighbors.scores[prompt.row, prompt.slot]
    return torch.tensor(first_points), NeighborInputs(ids, mask, scores)
