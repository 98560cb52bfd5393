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
from torch import nn

NOT_COUNTED = -100  # the target of tokens whose loss does not count
TOKENS_AT_ONCE = 512
ROW_STEP = 64


def takes_chunks(head: nn.Module) -> bool:
    """Return True if the logits are the head's weight times the states, plus a bias.

    Others are adapters, quantized, sharded and offloaded weights, and heads with hooks, as those
    that `torch.nn.utils.weight_norm` sets.
    """
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return False
    weight = head.weight
    is_here = type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta
    return is_here and weight.shape == (head.out_features, head.in_features)


class VocabularyTerms:
    """Numbers of each token's logits, without the logits: their log-sum-exp and some logits.

    They are constants to autograd, and `attach` adds their gradients to a loss. All are 0 where the
    target does not count.

    Attributes:
        log_sums: (B, T) float32, the log-sum-exp of the logits.
        target_logits: (B, T) float32, of the target.
        place_logits: (B, T, k·r) float32, of the tokens that may be copied; empty if none may.
    """

    def __init__(
        self,
        head: nn.Linear,
        states: torch.Tensor,  # (B, T, d)
        targets: torch.Tensor,  # (B, T) int64, or NOT_COUNTED
        mixture: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        """Compute the terms and the gradients.

        Args:
            mixture: of a copy head: evidence (B, T), log-odds (B, T), token ids (B, T, k·r) and
                weights (B, T, k·r), see `_factors`. None: the loss is log_sums - target_logits.
        """
        weight: torch.Tensor = head.weight
        bias: torch.Tensor | None = head.bias
        states = states.to(weight.device)
        if torch.is_autocast_enabled(states.device.type):
            states = states.to(torch.get_autocast_dtype(states.device.type))
        self._inputs = states.flatten(0, 1), weight, bias
        grads = torch.is_grad_enabled()
        copying: list[torch.Tensor | None] = [None] * 4
        if mixture is not None:
            copying = [tensor.detach().flatten(0, 1).to(states.device) for tensor in mixture]
        terms = _vocabulary_terms(
            *(None if tensor is None else tensor.detach() for tensor in self._inputs),
            targets.to(states.device).flatten(),
            *copying,
            *(grads and tensor is not None and tensor.requires_grad for tensor in self._inputs),
        )
        self.log_sums, self.target_logits, self.place_logits = (
            term.unflatten(0, targets.shape).to(targets.device) for term in terms[:3]
        )
        self._gradients = terms[3:]

    def attach(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss, summed over the tokens, with the gradients of all terms."""
        return _AttachGradients.apply(loss, *self._inputs, *self._gradients)


class _AttachGradients(torch.autograd.Function):
    """The identity of a scalar, with given gradients in other tensors."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        number = len(tensors) // 2
        ctx.save_for_backward(*tensors[number:])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A loss without logits has no second derivatives (create_graph=True). Call the model with "
                "skip_logits=False to have them."
            )
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                "A loss without logits has gradients once, and they were computed before. Call the model with "
                "skip_logits=False to compute them again."
            ) from error
        needed = zip(saved, ctx.needs_input_grad[1:], strict=False)
        # in place: the largest of them has the size of the vocabulary's weight
        found = [gradient.mul_(grad) if is_needed else None for gradient, is_needed in needed]
        return (grad, *found, *[None] * len(found))


# Opaque to a compiler: its graph has neither the number of counted tokens nor the chunks.
@torch.library.custom_op("retro::vocabulary_terms", mutates_args=())
def _vocabulary_terms(
    states: torch.Tensor,  # (N, d)
    weight: torch.Tensor,  # (V, d)
    bias: torch.Tensor | None,  # (V,)
    targets: torch.Tensor,  # (N,)
    evidence: torch.Tensor | None,  # (N,)
    log_odds: torch.Tensor | None,  # (N,)
    token_ids: torch.Tensor | None,  # (N, k·r)
    weights: torch.Tensor | None,  # (N, k·r)
    for_states: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the three terms, and the gradients of the summed loss, empty if not needed."""
    log_sums, target_logits, place_logits, d_states, d_weight, d_bias = (
        tensor.zero_() for tensor in _empty_terms(states, weight, targets, token_ids, for_states, for_weight, for_bias)
    )
    sum_dtype = torch.float32  # of sums over chunks, whatever the model's type
    d_weight, d_bias = d_weight.to(sum_dtype), d_bias.to(sum_dtype)
    master, dtype = weight.dtype, states.dtype  # under autocast, sums over all tokens are too large for `dtype`
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    counted = (targets != NOT_COUNTED).nonzero().squeeze(1)
    # One buffer for all chunks: where memory is new, the system must clear it first. The matrix
    # product is a quarter faster if its rows begin at multiples of `ROW_STEP`.
    vocabulary = weight.shape[0]
    buffer = weight.new_empty(min(TOKENS_AT_ONCE, len(counted)), -(-vocabulary // ROW_STEP) * ROW_STEP)[:, :vocabulary]
    with torch.autocast(states.device.type, enabled=False):
        for rows in counted.split(TOKENS_AT_ONCE):
            inputs, target, logits = states[rows], targets[rows].unsqueeze(1), buffer[: len(rows)]
            torch.mm(inputs, weight.T, out=logits)
            logits = (logits if bias is None else logits.add_(bias)).float()
            own, places, mixture = logits.gather(1, target), None, None
            if evidence is not None and log_odds is not None and token_ids is not None and weights is not None:
                places = token_ids[rows]
                place_logits[rows] = logits.gather(1, places)
                mixture = evidence[rows], log_odds[rows], place_logits[rows], weights[rows]
            largest = logits.amax(1, keepdim=True)
            exps = logits.sub_(largest).exp_()
            total = exps.sum(1, keepdim=True)
            log_sum = total.log() + largest
            log_sums[rows], target_logits[rows] = log_sum.squeeze(1), own.squeeze(1)
            if not (for_states or for_weight or for_bias):
                continue
            d_log_sum, d_target, d_places = _factors(log_sum, own, mixture)
            d_logits = exps.mul_(d_log_sum / total).scatter_add_(1, target, d_target)
            if places is not None and d_places is not None:
                d_logits.scatter_add_(1, places, d_places)
            if for_bias:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(states.dtype)
            if for_states:
                d_states[rows] = d_logits @ weight
            if for_weight and states.dtype == sum_dtype:
                d_weight.addmm_(d_logits.T, inputs)
            elif for_weight:
                d_weight += d_logits.T @ inputs
    return log_sums, target_logits, place_logits, d_states, d_weight.to(master), d_bias.to(master)


@_vocabulary_terms.register_fake
def _(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    evidence: torch.Tensor | None,
    log_odds: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    weights: torch.Tensor | None,
    for_states: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[torch.Tensor, ...]:
    return _empty_terms(states, weight, targets, token_ids, for_states, for_weight, for_bias)


def _empty_terms(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_ids: torch.Tensor | None,
    for_states: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[torch.Tensor, ...]:
    """Return tensors of the shapes and types of the results."""
    return (
        states.new_empty(targets.shape, dtype=torch.float32),
        states.new_empty(targets.shape, dtype=torch.float32),
        states.new_empty((*targets.shape, 0) if token_ids is None else token_ids.shape, dtype=torch.float32),
        torch.empty_like(states) if for_states else states.new_empty(0),
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if for_bias else 0),
    )


def _factors(
    log_sum: torch.Tensor, target_logit: torch.Tensor, mixture: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the derivatives of each token's loss in its log-sum, target logit and place logits.

    Without a mixture, the loss is Z − t, of log-sum Z and target logit t, both (N, 1). With one,
    the gate's log-odds are x = log_odds + Σ weights · (place_logits − Z), and the loss is
    Z − t − softplus(x + e − (t − Z)) + softplus(x), where x + e is `evidence` in place of log_odds.
    """
    if mixture is None:
        return torch.ones_like(log_sum), -torch.ones_like(target_logit), None
    evidence, log_odds, place_logits, weights = mixture
    expected = (weights * (place_logits - log_sum)).sum(1, keepdim=True)
    is_copied = (evidence.unsqueeze(1) + expected - target_logit + log_sum).sigmoid()
    d_log_odds = (log_odds.unsqueeze(1) + expected).sigmoid() - is_copied
    d_log_sum = 1 - is_copied - d_log_odds * weights.sum(1, keepdim=True)
    return d_log_sum, is_copied - 1, d_log_odds * weights
