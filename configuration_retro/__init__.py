"""RETRO's configuration. Importing it registers `RetroConfig` with `AutoConfig`."""

from transformers import AutoConfig

from .configuration_retro import RetroConfig
from .decoders import FOLLOWED_SETTINGS, decoder_config

AutoConfig.register("retro", RetroConfig)

__all__ = ["FOLLOWED_SETTINGS", "RetroConfig", "decoder_config"]
