"""Norms of RETRO's own parts, of the kind that the decoder has."""

from torch import nn

from configuration_retro import RetroConfig


def make_norm(config: RetroConfig) -> nn.Module:
    """Return a norm over the hidden size: an RMS norm if the decoder has one, else a layer norm."""
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
