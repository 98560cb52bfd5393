"""Forward hooks on a decoder whose code is not RETRO's, and the call that they work for.

The hooks themselves keep nothing, so copies and pickles of a model need no care. What one forward
computes is in its `DecoderCall`, which is known to the thread that runs it.

Shapes: B rows, T tokens of this call, T' tokens whose logits are computed, d hidden size, k
neighbors of a point, r tokens of a neighbor.
"""

import threading
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .reading import Reading
from .reading_layer import CrossAttentionBeside

_running = threading.local()


@dataclass
class DecoderCall:
    """One forward of a decoder, with what RETRO adds to it and keeps of it.

    Attributes:
        reading: the neighbors that this call reads.
        layers: cross-attention by the number of its decoder layer.
        layer_input: (B, T, d) the input of the layer with cross-attention that is running, until it
            has read.
        encoded: (B, C, k·r, d) the encoded neighbors, from the first of these layers on.
        output_states: (B, T', d) the states that enter the output embeddings.
        skips_logits: let the output embeddings see the first column only, since nobody needs the
            logits.
        weights: (B, heads, T, k·r) attention weights of each layer, if the attention implementation
            returns them.
    """

    reading: Reading
    layers: Mapping[int, CrossAttentionBeside]
    layer_input: torch.Tensor | None = None
    encoded: torch.Tensor | None = None
    output_states: torch.Tensor | None = None
    skips_logits: bool = False
    weights: list[torch.Tensor | None] = field(default_factory=list)

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function; hooks that run meanwhile work for this call."""
        before = getattr(_running, "call", None)
        _running.call = self
        try:
            return function(*args, **kwargs)
        finally:
            _running.call = before

    def read(self, layer_idx: int, branch: torch.Tensor) -> torch.Tensor | None:
        """Return what cross-attention adds to the attention branch (B, T, d) of a layer."""
        is_first = layer_idx == min(self.layers)
        reading = self.reading
        assert self.layer_input is not None, "checked by the hook"
        output, self.encoded, weights = self.layers[layer_idx](
            self.layer_input.to(branch.device) + branch,
            self.encoded,
            plan=reading.plan,
            matches=reading.cross_attention_matches,
            unencoded=reading.unencoded if is_first else None,
            memory=reading.memory if is_first else None,
        )
        self.weights.append(weights)
        self.layer_input = None  # a layer may call the branch's module again for its MLP, as Phi's dropout
        return output


def add_layer_hooks(layer: nn.Module, branch: nn.Module, layer_idx: int) -> None:
    """Let a decoder layer read neighbors behind its attention branch."""
    layer.register_forward_pre_hook(_keep_layer_input, with_kwargs=True)
    branch.register_forward_hook(partial(_add_cross_attention, layer_idx))


def add_output_hook(output_embeddings: nn.Module) -> None:
    """Keep the states that enter the output embeddings."""
    output_embeddings.register_forward_pre_hook(_keep_output_states)


def keep_call(checkpoint: Callable) -> Callable:
    """Return a checkpoint function that runs a layer again within the call that ran it first."""

    def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
        call = getattr(_running, "call", None)
        if call is None:
            return checkpoint(function, *args, **kwargs)
        again = copy(call)  # as it was before the layer
        calls = [call]

        def rerun(*inputs: Any, **settings: Any) -> Any:
            now = calls.pop() if calls else copy(again)
            return now.run(function, *inputs, **settings)

        return checkpoint(rerun, *args, **kwargs)

    return run


def _keep_layer_input(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    call = getattr(_running, "call", None)
    if call is not None:
        call.layer_input = args[0] if args else kwargs["hidden_states"]


def _add_cross_attention(layer_idx: int, branch: nn.Module, args: tuple, output: Any) -> Any:
    call = getattr(_running, "call", None)
    # another model on the same decoder may have hooks of its own there
    if call is None or call.layer_input is None or layer_idx not in call.layers:
        return output
    states = output[0] if isinstance(output, tuple) else output
    read = call.read(layer_idx, states)
    if read is None:
        return output
    return (states + read, *output[1:]) if isinstance(output, tuple) else states + read


def _keep_output_states(output_embeddings: nn.Module, args: tuple) -> tuple | None:
    call = getattr(_running, "call", None)
    if call is None:
        return None
    call.output_states = args[0]
    return (args[0][:, :1], *args[1:]) if call.skips_logits else None


@torch.no_grad()
def changes_logits(decoder: PreTrainedModel) -> bool:
    """Return True if the decoder's logits are not just what its output embeddings return.

    Some decoders scale or cap them. It runs on one token, with logits that are made up, and leaves
    the random state alone.
    """
    computed: list[torch.Tensor] = []

    def make_up(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        logits = torch.linspace(-50, 50, output.shape[-1], dtype=output.dtype, device=output.device)
        computed.append(logits.expand_as(output).clone())
        return computed[-1].clone()

    hook = decoder.get_output_embeddings().register_forward_hook(make_up)
    devices = [decoder.device] if decoder.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            token = torch.zeros(1, 1, dtype=torch.int64, device=decoder.device)
            logits = decoder(input_ids=token, use_cache=False, return_dict=True).logits
    finally:
        hook.remove()
    return len(computed) != 1 or not torch.equal(logits, computed[0])
