"""RETRO's configuration. Importing it registers `RetroConfig` with `AutoConfig`."""

from transformers import AutoConfig

from .configuration_retro import RetroConfig
from .decoders import decoder_config

AutoConfig.register("retro", RetroConfig)

__all__ = ["RetroConfig", "decoder_config"]
