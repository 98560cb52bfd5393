"""Find where a decoder's layers add attention to the residual, by running them once.

Cross-attention belongs behind that place (paper, section 2.4). Layers of different families are
written differently, so their numbers decide and not their names: the module is found whose output,
added to the layer's input, gives what the layer goes on with.

Shapes: T tokens, d hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

PROBE = [5, 3, 4]  # any token ids


def find_layers(decoder: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a decoder.

    Raises:
        ValueError: it has no list of as many modules as its configuration has layers.
    """
    depth = decoder.config.num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and _attention_name(module[0]) is not None:
            return module
    raise ValueError(_refusal(decoder, f"no list of {depth} layers with attention was found in it"))


def find_attention_branch(decoder: PreTrainedModel, layers: Sequence[int]) -> str:
    """Return the name of the module in each of some layers whose output is the attention branch.

    The branch is what is added to the layer's input x: attention itself, or the norm or the dropout
    behind it. In sequential layers a later module gets x + branch. In parallel layers x + branch +
    MLP is the layer's output. Both are compared bit by bit.

    Args:
        decoder: it is run on a few tokens.
        layers: their numbers.

    Raises:
        ValueError: no module is such a branch, or it differs from layer to layer.
    """
    stack = find_layers(decoder)
    traces = {layer: _Trace() for layer in layers}
    handles = [handle for layer in layers for handle in traces[layer].watch(stack[layer])]
    was_training = decoder.training
    try:
        decoder.eval()
        embed: Any = decoder.get_input_embeddings()
        tokens = torch.tensor([PROBE]) % embed.weight.shape[0]
        if not embed.weight.is_meta:  # else it is offloaded, and a hook moves its inputs
            tokens = tokens.to(embed.weight.device)
        # with gradients: without them, bitsandbytes packs 4-bit weights, and they have none later
        with torch.enable_grad():
            embeds = embed(tokens).detach().requires_grad_().clone()  # CTRL scales them in place
            decoder(inputs_embeds=embeds, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        decoder.train(was_training)
        for handle in handles:
            handle.remove()
    found = {layer: trace.branch(_attention_name(stack[layer])) for layer, trace in traces.items()}
    names = set(found.values())
    if None in names or len(names) != 1:
        raise ValueError(_refusal(decoder, f"layer -> module whose output is added to its input: {found}"))
    return names.pop() or ""


def _attention_name(layer: nn.Module) -> str | None:
    """Return the name of a layer's attention module."""
    names = [name for name, module in layer.named_children() if "attention" in type(module).__name__.lower()]
    return names[0] if names else None


def _refusal(decoder: PreTrainedModel, reason: str) -> str:
    return (
        f"The layers of {type(decoder).__name__} have no known place for cross-attention ({reason}). Set "
        "cca_layers=[] and use the copy head."
    )


@dataclass
class _Call:
    """One call of a module in a layer, with its first input and its output."""

    name: str
    given: torch.Tensor | None
    returned: torch.Tensor | None = None


@dataclass
class _Trace:
    """What happened in one layer: its input, its output, and the calls of its modules in order."""

    given: torch.Tensor | None = None
    returned: torch.Tensor | None = None
    calls: list[_Call] = field(default_factory=list)

    def watch(self, layer: nn.Module) -> list[Any]:
        """Record the next run of a layer; return the handles of the hooks."""
        handles = [
            layer.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.register_forward_hook(self._end),
        ]
        for name, module in layer.named_children():
            handles.append(module.register_forward_pre_hook(partial(self._begin_call, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._end_call, name)))
        return handles

    def _begin(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.given = _copy(_first_input(args, kwargs))

    def _end(self, layer: nn.Module, args: tuple, output: Any) -> None:
        self.returned = _copy(output)

    def _begin_call(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls.append(_Call(name, _copy(_first_input(args, kwargs))))

    def _end_call(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        [call for call in self.calls if call.name == name][-1].returned = _copy(output)

    def branch(self, attention: str | None) -> str | None:
        """Return the name of the module whose output is the attention branch, if there is one."""
        if attention not in (names := [call.name for call in self.calls]):
            return None
        start = names.index(attention)
        chain = [self.calls[start]]  # attention, and what is done to its output alone
        for call in self.calls[start + 1 :]:
            if _equal(call.given, chain[-1].returned):
                chain.append(call)
        for call in reversed(chain):
            place = self.calls.index(call)
            # cross-attention follows the first call of a module, so a later one is no place for it
            if place == names.index(call.name) and self._is_branch(call, self.calls[place + 1 :]):
                return call.name
        return None

    def _is_branch(self, call: _Call, later: list[_Call]) -> bool:
        x, branch = self.given, call.returned
        if x is None or branch is None or x.shape != branch.shape or not branch.any():
            return False
        if any(_equal(other.given, x + branch) for other in later):
            return True
        others = [other.returned for other in self.calls if other is not call]
        return any(
            _equal(self.returned, total)
            for mlp in others
            if mlp is not None and mlp.shape == x.shape
            for total in (x + branch + mlp, branch + mlp + x, x + mlp + branch)
        )


def _first_input(args: tuple, kwargs: dict) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _copy(value: Any) -> torch.Tensor | None:
    """Return a copy of a tensor, or of the first of a tuple; layers may change it in place."""
    value = value[0] if isinstance(value, tuple) and value else value
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else None


def _equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Return True for the same numbers; the tokens may be laid out as (B, T, d) or (B·T, d)."""
    if left is None or right is None or left.dtype != right.dtype or left.numel() != right.numel():
        return False
    return torch.equal(left.flatten(), right.flatten())
