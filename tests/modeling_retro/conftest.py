"""The small RETRO of these tests, under each attention implementation."""

import pytest

from modeling_retro import RetroForCausalLM

from ..support.retro_models import small_model


@pytest.fixture(params=["eager", "sdpa"])
def model(request) -> RetroForCausalLM:
    return small_model(attn_implementation=request.param)
