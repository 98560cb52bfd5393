"""The small RETRO of these tests under each attention implementation, and saved decoders."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling_retro import RetroForCausalLM

from ..support.decoders import FAMILIES, small_decoder
from ..support.retro_models import small_model


@pytest.fixture(scope="session")
def saved_decoder(tmp_path_factory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a family's small decoder."""

    @functools.cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp("decoder") / family
        small_decoder(family).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(params=["eager", "sdpa"])
def model(request) -> RetroForCausalLM:
    return small_model(attn_implementation=request.param)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(family, saved_decoder) -> Path:
    """Return the folder of the family's small decoder."""
    return saved_decoder(family)
