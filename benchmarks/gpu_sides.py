"""The sides that gpu.py compares, by name."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Side:
    """A model that is measured.

    Attributes:
        kind: "gpt2", "retro" or "retro_pytorch".
        settings: settings of `RetroConfig`.
        compiled: training is measured compiled, too.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    compiled: bool = True

    @property
    def reads(self) -> bool:
        """True if the model reads neighbors."""
        return self.kind != "gpt2" and self.settings.get("use_retrieval", True)


DECODING = {
    "GPT-2": Side("gpt2"),
    "RETRO, neighbors off": Side("retro", {"use_retrieval": False}),
    "RETRO, cross-attention": Side("retro"),
    "RETRO, copy head alone": Side("retro", {"copy_head": True, "cca_layers": []}),
    "RETRO, cross-attention and copy head": Side("retro", {"copy_head": True}),
}
CACHES = ("dynamic", "static", "compiled")  # compiled: a static cache, and torch.compile as the library calls it

TRAINING = {
    "GPT-2": Side("gpt2"),
    "RETRO, cross-attention": Side("retro"),
    "RETRO, cross-attention and copy head": Side("retro", {"copy_head": True}),
    "RETRO, cross-attention, eager attention": Side("retro", {"attn_implementation": "eager"}, compiled=False),
    "retro-pytorch": Side("retro_pytorch"),
}
MODES = ("eager", "compiled")  # compiled: torch.compile with inductor
