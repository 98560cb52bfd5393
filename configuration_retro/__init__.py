"""RETRO's configuration, registered with `AutoConfig` on import."""

from transformers import AutoConfig

from .configuration_retro import RetroConfig

AutoConfig.register("retro", RetroConfig)

__all__ = ["RetroConfig"]
