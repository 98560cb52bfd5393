"""Movable: a dataclass of tensors that accelerate moves to the device of the layer that gets it."""

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

M = TypeVar("M", bound="Movable")


class Movable:
    """A dataclass of tensors with a `to` method; accelerate moves it to a layer's device."""

    def to(self: M, device: torch.device, **kwargs: Any) -> M:
        """Return a copy whose tensors are on the device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor | Movable)}
        return replace(self, **{name: value.to(device, **kwargs) for name, value in tensors.items()})  # type: ignore[type-var]
