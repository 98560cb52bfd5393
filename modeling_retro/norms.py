"""Norms of RETRO's own parts, of the kind that the decoder has."""

from torch import nn

from configuration_retro import RetroConfig


def make_norm(config: RetroConfig) -> nn.Module:
    """Return a norm over the hidden size: an RMS norm where the decoder has one, else a layer norm."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.n_embd, eps=config.layer_norm_epsilon)
