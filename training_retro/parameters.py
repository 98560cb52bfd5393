"""A model's parameters by part: how many there are, and how many are trained."""

import torch

from modeling_retro.loading import COPY_HEAD, ENCODER, part_of

DECODER, CROSS_ATTENTION, ADAPTERS = "decoder", "cross-attention", "LoRA adapters"
PARTS = (DECODER, ENCODER, CROSS_ATTENTION, COPY_HEAD, ADAPTERS)


def count_parameters(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return the number of parameters of each part, and how many of them are trained.

    Args:
        model: a RETRO model, or a PEFT model around it.

    Returns:
        part -> (total, trained), without parts that the model does not have.
    """
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        part = ADAPTERS if "lora_" in name else part_of(name) or DECODER
        part = part if part in counts else CROSS_ATTENTION  # it is named by its layer
        total, trained = counts[part]
        counts[part] = total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad
    return {part: count for part, count in counts.items() if count[0]}


def parameter_table(model: torch.nn.Module) -> str:
    """Return the counts of [`count_parameters`] as a table, with their sums in the last line."""
    counts = count_parameters(model)
    total, trained = (sum(column) for column in zip(*counts.values(), strict=True))
    lines = [f"{'parameters':16s}{'total':>18s}{'trained':>18s}"]
    lines += [f"{part:16s}{there:18,d}{own:18,d}" for part, (there, own) in {**counts, "all": (total, trained)}.items()]
    return "\n".join(lines) + f"  ({100 * trained / total:.1f} %)"
