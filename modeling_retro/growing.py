"""Tensors that grow token by token with room behind them, so that a step copies one token, not all.

A step of `generate()` that appends by concatenation copies all earlier tokens, in each layer.
"""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens that fit behind a tensor before it is copied again


class Growth:
    """Appends to one tensor, in place where there is room behind it.

    With gradients, in a compiled graph, and in a pickle or a deep copy it falls back to a copy.

    Args:
        dim: the dimension of the tokens, counted from the first.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._room: torch.Tensor | None = None
        self._length = 0  # of what was returned last

    def __reduce__(self) -> tuple:  # of copies, too
        return Growth, (self.dim,)

    def append(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return the tensor with new tokens behind it; it may share memory with the tensor.

        Args:
            tensor: what this method returned last. Any other one is copied: somebody may still read
                what was behind it.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or tensor.dtype != new.dtype:
            return torch.cat([tensor, new], dim=self.dim)
        before = tensor.shape[self.dim]
        length = before + new.shape[self.dim]
        room = self._room
        if room is None or not self._begins(room, tensor) or length > room.shape[self.dim]:
            shape = list(tensor.shape)
            shape[self.dim] = length + ROOM
            room = self._room = new.new_empty(shape)
            room.narrow(self.dim, 0, before).copy_(tensor)
        room.narrow(self.dim, before, new.shape[self.dim]).copy_(new)
        self._length = length
        return room.narrow(self.dim, 0, length)

    def _begins(self, room: torch.Tensor, tensor: torch.Tensor) -> bool:
        """Return True if the tensor is all that is in the room, and may be extended there."""
        return (
            tensor.shape[self.dim] == self._length
            and room.data_ptr() == tensor.data_ptr()
            and room.stride() == tensor.stride()
            and room.device == tensor.device
            and room.shape[: self.dim] == tensor.shape[: self.dim]
            and room.is_inference() == torch.is_inference_mode_enabled()
        )


class GrowingLayer(DynamicLayer):
    """The library's cache layer, whose keys and values grow in place."""

    def __init__(self) -> None:
        super().__init__()
        self._growing_keys, self._growing_values = Growth(2), Growth(2)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, heads, T, head_dim); return all (B, heads, L, head_dim)."""
        if not self.get_seq_length():
            return super().update(key_states, value_states)
        assert self.keys is not None and self.values is not None, "there are tokens"
        self.keys = self._growing_keys.append(self.keys, key_states)
        self.values = self._growing_values.append(self.values, value_states)
        return self.keys, self.values


def grow_in_place(cache: Cache) -> None:
    """Let the empty layers of a cache grow in place, where they are the library's plain ones."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[number] = GrowingLayer()
