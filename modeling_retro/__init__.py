"""RETRO models. Importing them registers them with `AutoModel` and `AutoModelForCausalLM`."""

from transformers import AutoModel, AutoModelForCausalLM

from configuration_retro import RetroConfig

from .cache import RetroCache
from .decoder_model import RetroDecoderModel
from .modeling_retro import RetroForCausalLM, RetroModel, RetroPreTrainedModel
from .neighbor_fetching import RetrievalLog, RetrievedChunk, Retriever

AutoModel.register(RetroConfig, RetroModel)
AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM)

__all__ = [
    "RetrievalLog",
    "RetrievedChunk",
    "Retriever",
    "RetroCache",
    "RetroConfig",
    "RetroDecoderModel",
    "RetroForCausalLM",
    "RetroModel",
    "RetroPreTrainedModel",
]
