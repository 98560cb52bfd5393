"""A frozen pretrained decoder of any architecture, and the configuration of a copy head on it."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import retrieval.tokenizer_loading
from configuration_retro import RetroConfig


def load_decoder(path: Path) -> PreTrainedModel:
    """Load a decoder in float32 from a folder or a GGUF file."""
    folder, file = _place(path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load a decoder's tokenizer from a folder or a GGUF file."""
    folder, file = _place(path)
    return retrieval.tokenizer_loading.load_tokenizer(folder, **file)


def _place(path: Path) -> tuple[Path, dict[str, str]]:
    """Return a model's folder, and the argument that names its file if it is a GGUF file."""
    return (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})


def head_config(model: PreTrainedModel, chunk_size: int, k: int) -> RetroConfig:
    """Return the configuration of a copy head on a decoder."""
    embed = model.get_input_embeddings()
    assert isinstance(embed, nn.Embedding), "a causal language model embeds tokens"
    return RetroConfig(
        vocab_size=embed.num_embeddings,
        n_embd=embed.embedding_dim,
        n_head=1,
        n_layer=1,
        chunk_size=chunk_size,
        num_neighbors=k,
        cca_layers=[],
        copy_head=True,
        bos_token_id=None,
        eos_token_id=None,
    )
