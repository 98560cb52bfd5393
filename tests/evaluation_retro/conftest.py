"""Small models, a tokenizer and a knowledge base, as fixtures."""

from ..support.evaluated import attender, copier, opened
from ..support.training_world import config, retriever, texts, tokenizer, tokenizer_folder, world

__all__ = [
    "attender",
    "config",
    "copier",
    "opened",
    "retriever",
    "texts",
    "tokenizer",
    "tokenizer_folder",
    "world",
]
