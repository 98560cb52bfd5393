"""Fixtures of evaluation: small saved RETRO models that read the world's knowledge base."""

import pytest
import torch

from evaluation_retro.opening import ModelSettings, open_model
from modeling_retro import RetroForCausalLM

from .retro_models import open_weights


def save_reader(folder, config, tokenizer, **changes):
    """Save a RETRO whose readers are open, and its tokenizer."""
    torch.manual_seed(0)
    config.update({"copy_head": True, "n_positions": 128, "initializer_range": 0.3, **changes})
    model = RetroForCausalLM(config).eval()
    open_weights(model, model.parameters(), noise=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copier(world, config, tokenizer):
    """The folder of a RETRO that reads with a copy head alone."""
    folder = world / "copier"
    return folder if folder.exists() else save_reader(folder, config, tokenizer, cca_layers=[])


@pytest.fixture
def attender(world, config, tokenizer):
    """The folder of a RETRO that reads with cross-attention and a copy head."""
    folder = world / "attender"
    return folder if folder.exists() else save_reader(folder, config, tokenizer)


def place_of(world):
    """Return the settings that name the world's knowledge base."""
    return {
        "knowledge_base": str(world / "kb.db"),
        "collection_name": "texts",
        "embedding_model": str(world / "embedding"),
        "device": "cpu",
    }


@pytest.fixture
def opened(world, copier):
    """The copier with the world's knowledge base."""
    both = open_model(ModelSettings(model=str(copier), **place_of(world)))
    yield both
    both.close()
