"""The language-modeling loss without the logits of all tokens.

The logits of a batch are its largest tensor: tokens x vocabulary. Here the output embeddings are
applied to some tokens at a time, and the gradients follow at once, while these logits are there, as
in Liger kernels (Hsu et al. 2024, arXiv 2410.10989). So no product with the vocabulary is computed
twice.

The gradient of a token's loss in its logits is a multiple of their softmax plus one of the target's
one-hot vector. Both factors are known as soon as the logits' log-sum-exp is, also where the logits
are mixed with a copy distribution.

Shapes: N tokens, d hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NOT_COUNTED = -100  # the target of tokens whose loss does not count
TOKENS_AT_ONCE = 512


def takes_chunks(head: nn.Module) -> bool:
    """Return True if the logits are the head's weight times the states, plus a bias.

    Adapters, quantized weights and weights that are gathered in the head's own call are not.
    """
    return type(head) is nn.Linear and head.weight.shape == (head.out_features, head.in_features)


class VocabularyTerms:
    """Two numbers of each token's logits, without the logits: their log-sum-exp and the target's.

    Both are constants to autograd, and `attach` adds their gradients to a loss.

    Attributes:
        log_sums: (N,) float32, the log-sum-exp of the logits, 0 where the target is not counted.
        target_logits: (N,) float32, likewise.
    """

    def __init__(
        self,
        head: nn.Linear,
        states: torch.Tensor,  # (N, d)
        targets: torch.Tensor,  # (N,) int64, or NOT_COUNTED
        mixture: torch.Tensor | None = None,  # (3, N) float32
    ) -> None:
        """Compute the terms and the gradients.

        Args:
            mixture: of a copy head, see `_factors`. None: the loss is log_sums - target_logits.
        """
        weight, bias = head.weight, head.bias
        states = states.to(weight.device)
        if torch.is_autocast_enabled(states.device.type):
            dtype = torch.get_autocast_dtype(states.device.type)
            states, weight, bias = states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        self._inputs = states, weight, bias
        grads = torch.is_grad_enabled()
        self.log_sums, self.target_logits, *self._gradients = _vocabulary_terms(
            states.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            targets,
            None if mixture is None else mixture.detach(),
            grads and states.requires_grad,
            grads and weight.requires_grad,
            grads and bias is not None and bias.requires_grad,
        )

    def attach(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss, summed over the tokens, with the gradients of both terms."""
        return _AttachGradients.apply(loss, *self._inputs, *self._gradients)


class _AttachGradients(torch.autograd.Function):
    """The identity of a scalar, with given gradients in other tensors."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        number = len(tensors) // 2
        ctx.save_for_backward(*tensors[number:])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        found = [
            saved * grad if needed else None
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=False)
        ]
        return (grad, *found, *[None] * len(found))


# Opaque to a compiler: its graph has neither the number of counted tokens nor the chunks.
@torch.library.custom_op("retro::vocabulary_terms", mutates_args=())
def _vocabulary_terms(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    mixture: torch.Tensor | None,
    for_states: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-sums, target logits, and the gradients of the summed loss, empty if not needed."""
    log_sums, target_logits = (torch.zeros(targets.shape, device=states.device) for _ in range(2))
    d_states = torch.zeros_like(states) if for_states else states.new_empty(0)
    # sums over chunks, in float32 whatever the model's type
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else weight.new_empty(0)
    d_bias = weight.new_zeros(weight.shape[0] if for_bias else 0, dtype=torch.float32)
    counted = (targets != NOT_COUNTED).nonzero().squeeze(1)
    # one buffer for all chunks: where memory is new, the system must clear it first
    buffer = weight.new_empty(min(TOKENS_AT_ONCE, len(counted)), weight.shape[0])
    with torch.autocast(states.device.type, enabled=False):
        for rows in counted.split(TOKENS_AT_ONCE):
            inputs, target, logits = states[rows], targets[rows].unsqueeze(1), buffer[: len(rows)]
            torch.mm(inputs, weight.T, out=logits)
            logits = (logits if bias is None else logits.add_(bias)).float()
            own, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
            exps = logits.sub_(largest).exp_()
            total = exps.sum(1, keepdim=True)
            log_sum = total.log() + largest
            log_sums[rows], target_logits[rows] = log_sum.squeeze(1), own.squeeze(1)
            if not (for_states or for_weight or for_bias):
                continue
            d_log_sum, d_target = _factors(log_sum, own, None if mixture is None else mixture[:, rows].unsqueeze(-1))
            d_logits = exps.mul_(d_log_sum / total).scatter_add_(1, target, d_target)
            if for_bias:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(states.dtype)
            if for_states:
                d_states[rows] = d_logits @ weight
            if for_weight and d_weight.dtype == states.dtype:
                d_weight.addmm_(d_logits.T, inputs)
            elif for_weight:
                d_weight += d_logits.T @ inputs
    return log_sums, target_logits, d_states, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


@_vocabulary_terms.register_fake
def _(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    mixture: torch.Tensor | None,
    for_states: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    log_sums, target_logits = (states.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))
    d_states = torch.empty_like(states) if for_states else states.new_empty(0)
    d_weight = torch.empty_like(weight) if for_weight else weight.new_empty(0)
    return log_sums, target_logits, d_states, d_weight, weight.new_empty(weight.shape[0] if for_bias else 0)


def _factors(
    log_sum: torch.Tensor, target_logit: torch.Tensor, mixture: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the derivatives of a token's loss in the log-sum Z and in the target's logit t.

    Without a mixture, the loss is Z − t. With (evidence e, log-odds o, slope k) it is
    Z − t − softplus(e + (1 − k)·Z − t) + softplus(o − k·Z), see `CopyHead.losses`.
    """
    if mixture is None:
        return torch.ones_like(log_sum), -torch.ones_like(target_logit)
    evidence, log_odds, slope = mixture
    is_copied = (evidence + (1 - slope) * log_sum - target_logit).sigmoid()
    gate = (log_odds - slope * log_sum).sigmoid()
    return 1 - (1 - slope) * is_copied - slope * gate, is_copied - 1
