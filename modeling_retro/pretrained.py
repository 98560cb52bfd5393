"""RetroPreTrainedModel: the base class of RETRO models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from configuration_retro import RetroConfig

from .chunked_cross_attention import ChunkedCrossAttention
from .copy_head import CopyHead
from .decoder_block import RetroBlock
from .decoder_calls import keep_call
from .library import CACHE
from .loading import LoadingMixin
from .sharing import SharingMixin


class RetroPreTrainedModel(LoadingMixin, SharingMixin, GPT2PreTrainedModel):
    """Initialization, loading and sharing of RETRO models."""

    config: RetroConfig
    config_class = RetroConfig
    _no_split_modules = ["RetroBlock", "RetroEncoderLayer"]
    _skip_keys_device_placement = [CACHE, "memory"]
    _can_record_outputs = {
        "hidden_states": RetroBlock,
        "attentions": OutputRecorder(GPT2Attention, layer_name=".attn", index=1),
        "cross_attentions": OutputRecorder(ChunkedCrossAttention, index=1),
    }

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside its own tree, transformers skips modules without parameters of their own,
        # and with them the scaled and the zero projections. All initialization here respects loaded
        # weights, as the library's does.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChunkedCrossAttention | CopyHead):
            module.init_weights()

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        # layers of other decoders read neighbors through hooks, also when they run again
        if self.config.text_config is not None:
            settings = getattr(gradient_checkpointing_func, "keywords", {})
            if self.config.cca_layers and settings.get("use_reentrant"):
                raise ValueError(
                    "Cross-attention beside a decoder gets no gradients from reentrant checkpointing. Set "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )
            gradient_checkpointing_func = keep_call(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the vocabulary as `PreTrainedModel.resize_token_embeddings` does."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.text_config is not None:
            self.config.follow_decoder()
        return embeddings
