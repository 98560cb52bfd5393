"""A small tokenizer, model configuration and knowledge base, as fixtures."""

from ..support.training_world import config, retriever, texts, tokenizer, tokenizer_folder, world

__all__ = ["config", "retriever", "texts", "tokenizer", "tokenizer_folder", "world"]
