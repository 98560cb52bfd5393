"""GPT-2's activation for training: its own values to the last bit, and a gradient that needs its input alone."""

import torch
from torch import nn
from transformers.activations import NewGELUActivation


class LeanGELU(nn.Module):
    """`gelu_new`, which keeps one tensor for its gradient where the library's keeps six, and computes it in one kernel.

    Values are the library's own. The gradient is that of torch's fused GELU, the same function up to rounding.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # the compiler makes one kernel of it by itself
            return NewGELUActivation.forward(self, hidden_states)
        return _LeanGELU.apply(hidden_states)


class _LeanGELU(torch.autograd.Function):
    @staticmethod
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return NewGELUActivation.forward(None, hidden_states)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> torch.Tensor:
        (hidden_states,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad_output, hidden_states, approximate="tanh")
