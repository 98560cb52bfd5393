"""The activation's values are GPT-2's to the bit; its gradient is checked in float64."""

import pytest
import torch
from transformers.activations import ACT2FN

from modeling_retro.activation import SLICE, LeanGELU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_gpt2s_to_the_last_bit(dtype):
    for size in (4001, 3 * SLICE * torch.get_num_threads() + 1):
        states = torch.linspace(-12, 12, size).to(dtype)
        for shaped in (states, states.view(1, -1).T):
            assert torch.equal(LeanGELU()(shaped), ACT2FN["gelu_new"](shaped))
            with torch.no_grad():
                assert torch.equal(LeanGELU()(shaped), ACT2FN["gelu_new"](shaped))


def test_the_gradient_is_exact_up_to_rounding():
    states = torch.linspace(-12, 12, 4001, requires_grad=True)
    LeanGELU()(states).sum().backward()
    exact = states.detach().double().requires_grad_()
    ACT2FN["gelu_new"](exact).sum().backward()
    torch.testing.assert_close(states.grad.double(), exact.grad, atol=2e-6, rtol=1e-5)


def test_only_the_input_is_kept_for_the_gradient():
    kept = []
    states = torch.randn(64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        LeanGELU()(states)
    assert [tensor.shape for tensor in kept] == [states.shape]
