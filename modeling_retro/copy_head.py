"""The copy head: a pointer-generator (Vinyals et al., 2015; See et al., 2017) over the neighbors.

Where the text goes on as a passage of a neighbor does, the token that followed there is a good
prediction. The paper's cross-attention must first find that out; the copy head has it built in, and
so learns within few steps.

Shapes: B rows, T tokens of this call, T' tokens whose logits are computed, d hidden size, V
vocabulary; G groups of w queries (see `QueryGroups`); k neighbors of a point, r tokens of a
neighbor; n = `match_length`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from configuration_retro import RetroConfig

from .attention_plan import AttentionPlan
from .chunked_loss import VocabularyTerms
from .movable import Movable
from .neighbor_inputs import NeighborInputs

# what the gate sees beside the hidden state and the matches: peakedness, agreement, similarity,
# expected log-probability
GATE_STATISTICS = 4
CLOSED_GATE_LIMIT = 8.0  # the largest log-evidence that the gradient of a closed gate goes by
RENAMED_PARAMETERS = {"valve": "gate_scale"}  # names in checkpoints of earlier versions -> present names


@dataclass
class CopyCandidates(Movable):
    """The neighbor tokens that the columns of one call may copy.

    Attributes:
        plan: which columns attend to which neighbors.
        matches: (n, B·G, w, k·r) how well the last 1, 2, … n tokens match those before each place.
        token_ids: (B, G, k·r) int64.
        first_places: (B, G, k·r) int64, where the same token first occurs in the group's neighbors.
        first_places_in_neighbor: (B, G, k·r) int64, where it first occurs in the same neighbor.
        scores: (B, G, k) the similarity that each neighbor was retrieved with.
    """

    plan: AttentionPlan
    matches: torch.Tensor
    token_ids: torch.Tensor
    first_places: torch.Tensor
    first_places_in_neighbor: torch.Tensor
    scores: torch.Tensor


def find_candidates(
    config: RetroConfig,
    plan: AttentionPlan | None,
    matches: torch.Tensor | None,
    neighbors: NeighborInputs | None,
) -> CopyCandidates | None:
    """Return what the copy head may copy; None without one, or without neighbors so far.

    With a cache, each point's candidates are prepared once.

    Args:
        neighbors: those of the points that this call reaches, if any.
    """
    if not config.copy_head or plan is None or matches is None:
        return None
    new = {}
    if neighbors is not None:
        ids, mask = neighbors.ids, neighbors.mask
        new = {
            "token_ids": ids.flatten(2),
            "first_places": _first_places(ids.flatten(2).unsqueeze(2), mask.flatten(2).unsqueeze(2)),
            "first_places_in_neighbor": _first_places(ids, mask),
            "scores": neighbors.scores,
        }
    return CopyCandidates(plan, matches, **plan.recall("copy", new))


def _first_places(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return where each token of ids (B, C, s, t) first occurs among its t, as a place in s·t.

    The result has shape (B, C, s·t).
    """
    same = (ids.unsqueeze(-1) == ids.unsqueeze(-2)) & mask.unsqueeze(-2)
    first = same.byte().argmax(-1)
    starts = torch.arange(0, ids.shape[2] * ids.shape[3], ids.shape[3], device=ids.device)
    return (first + starts.unsqueeze(-1)).flatten(2)


class CopyHead(nn.Module):
    """Mixes the decoder's and the copy distribution: p = (1 − g) · p_decoder + g · p_copy.

    The gate g is the probability of copying; 1 − g is See et al.'s generation probability. p_copy
    sums an attention distribution over the k·r neighbor tokens by token. A place's attention score
    is a weighted sum of how well the last 1, 2, … n tokens match those before it (see
    `match_tokens`) and of the similarity that its neighbor was found with.

    The gate's odds g / (1 − g) are a logistic regression on the decoder's last hidden state and on
    features that tell good neighbors from bad (see `copy_distribution`), times `gate_scale`. It
    starts at zero: until trained, the logits are GPT-2's.

    The weights of matches, similarity and features are stored divided by `match_scale`: a few
    numbers must go far in few steps, at the learning rates of matrices.
    """

    def __init__(self, config: RetroConfig):
        super().__init__()
        self.config = config
        self.match = nn.Parameter(torch.empty(config.match_length))
        self.similarity = nn.Parameter(torch.empty(1))
        self.gate_hidden = nn.Parameter(torch.empty(config.output_width))
        self.gate_features = nn.Parameter(torch.empty(GATE_STATISTICS + config.match_length))
        self.gate_bias = nn.Parameter(torch.empty(1))
        self.gate_scale = nn.Parameter(torch.empty(1))
        self.register_load_state_dict_pre_hook(_rename_old_parameters)

    def init_weights(self) -> None:
        """Set the match weights to the configuration's, and all others to zero."""
        init.copy_(self.match, torch.tensor(self.config.stored_match_weights))
        for parameter in (self.similarity, self.gate_hidden, self.gate_features, self.gate_bias, self.gate_scale):
            init.zeros_(parameter)

    def forward(
        self,
        logits: torch.Tensor,  # (B, T', V)
        hidden_states: torch.Tensor,  # (B, T', d)
        candidates: CopyCandidates,
        columns: slice | torch.Tensor,  # the T' of the call's T columns
    ) -> torch.Tensor:  # (B, T', V)
        """Return the logits of the mixture."""
        copy_probs, features, token_ids = (states[:, columns] for states in self.copy_distribution(candidates))
        # in log space, and in float32 whatever the model's type
        log_probs = _log_probs(logits, token_ids)
        log_odds = self._gate_log_odds(hidden_states, features, copy_probs, log_probs)
        is_copied = copy_probs > 0
        log_evidence = log_odds.unsqueeze(-1) + copy_probs.masked_fill(~is_copied, 1.0).log() - log_probs
        # logits may be shifted by a constant: (1 − g) · p + g · c is p · (1 + odds · c / p), up to
        # normalization
        boost = torch.where(is_copied, _log1p_scaled_exp(log_evidence, self.gate_scale.float()), 0.0)
        return logits.scatter_add(-1, token_ids, boost.to(logits.dtype))

    def losses(
        self,
        head: nn.Linear,
        hidden_states: torch.Tensor,  # (B, T, d)
        targets: torch.Tensor,  # (B, T) int64
        candidates: CopyCandidates,
    ) -> tuple[torch.Tensor, VocabularyTerms]:
        """Return each token's loss under the mixture (B, T), without logits (see `chunked_loss`).

        The loss is that of the decoder, minus the logarithm of what `forward` adds to the target's
        logit, plus that of what it multiplies the sum of exp(logits) by.
        """
        copy_probs, features, token_ids = self.copy_distribution(candidates)
        target_prob = torch.where(token_ids == targets.unsqueeze(-1), copy_probs, 0.0).sum(-1)
        is_copied = target_prob > 0
        log_target_prob = target_prob.masked_fill(~is_copied, 1.0).log()
        can_copy, scale = candidates.plan.can_attend, self.gate_scale.float()

        expectation = self.config.match_scale * self.gate_features[-1].float() / self.config.gate_log_prob_scale
        log_odds = self._gate_log_odds(hidden_states, features, copy_probs, torch.zeros_like(copy_probs))
        log_odds = torch.where(can_copy, log_odds + scale.clamp(min=0.0).log(), -torch.inf)
        evidence = torch.where(is_copied, log_odds + log_target_prob, -torch.inf)
        mixture = evidence, log_odds, token_ids, expectation * copy_probs
        terms = VocabularyTerms(head, hidden_states, targets, mixture)

        log_probs = terms.place_logits - terms.log_sums.unsqueeze(-1)
        log_odds = self._gate_log_odds(hidden_states, features, copy_probs, log_probs)
        losses = terms.log_sums - terms.target_logits
        boost = torch.where(is_copied, _log1p_scaled_exp(log_odds + log_target_prob + losses, scale), 0.0)
        growth = torch.where(can_copy, self._log_normalizer(log_odds, copy_probs, log_probs), 0.0)
        return losses - boost + growth, terms

    def _log_normalizer(
        self, log_odds: torch.Tensor, copy_probs: torch.Tensor, log_probs: torch.Tensor
    ) -> torch.Tensor:
        """Return log(1 + odds), by which `forward` raises the log-sum of the logits, (B, T)."""
        scale = _with_gradient_below_zero(self.gate_scale.float())
        is_open = scale > 0
        is_copied = copy_probs > 0
        log_copied = log_odds.unsqueeze(-1) + copy_probs.masked_fill(~is_copied, 1.0).log()
        limited = torch.minimum(log_copied, log_probs + CLOSED_GATE_LIMIT).exp()
        closed = scale * torch.where(is_copied, limited, 0.0).sum(-1)
        return torch.where(is_open, F.softplus(log_odds + torch.where(is_open, scale, 1.0).log()), closed)

    def attention_distribution(self, candidates: CopyCandidates) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the attention over the neighbor tokens of each group.

        Returns:
            attention (B·G, w, k·r) float32; similarity (B·G, 1, k·r) of each place's neighbor.
        """
        plan, scale = candidates.plan, self.config.match_scale
        neighbor_length = candidates.token_ids.shape[-1] // candidates.scores.shape[-1]
        similarity = candidates.scores.float().flatten(0, 1).repeat_interleave(neighbor_length, dim=-1).unsqueeze(1)
        scores = (scale * self.match.float().view(-1, 1, 1, 1) * candidates.matches).sum(0)
        scores = scores + scale * self.similarity.float() * similarity
        scores = scores.masked_fill(plan.is_masked.unsqueeze(1), torch.finfo(scores.dtype).min)
        return scores.softmax(-1), similarity

    def copy_distribution(self, candidates: CopyCandidates) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the copy distribution and the gate's features.

        Returns:
            copy_probs (B, T, k·r) float32: the probability of copying each token, at the place
                where it first occurs; 0 at other places, and for columns that attend to nothing.
            features (B, T, n + 3) for the gate: the attended matches of 1, 2, … n tokens; how
                peaked the copy distribution is; how much of that the neighbors agree on; the
                attended similarity.
            token_ids (B, T, k·r) int64.
        """
        plan = candidates.plan
        attention, similarity = self.attention_distribution(candidates)
        copy_probs = _sum_at(attention, candidates.first_places.flatten(0, 1))
        by_neighbor = _sum_at(attention, candidates.first_places_in_neighbor.flatten(0, 1))
        peakedness = copy_probs.square().sum(-1)
        agreement = peakedness - by_neighbor.square().sum(-1)
        matches = (attention * candidates.matches).sum(-1)  # (n, B·G, w)
        features = torch.stack([*matches, peakedness, agreement, (attention * similarity).sum(-1)], dim=-1)
        token_ids = candidates.token_ids.flatten(0, 1).unsqueeze(1).expand(-1, plan.queries.width, -1)
        can_attend = plan.can_attend.unsqueeze(-1)
        return (
            torch.where(can_attend, plan.queries.ungroup(copy_probs), 0.0),
            torch.where(can_attend, plan.queries.ungroup(features), 0.0),
            plan.queries.ungroup(token_ids),
        )

    def _gate_log_odds(
        self, hidden_states: torch.Tensor, features: torch.Tensor, copy_probs: torch.Tensor, log_probs: torch.Tensor
    ) -> torch.Tensor:
        """Return log(g / (1 − g)) without `gate_scale`, (B, T'), given the decoder's log_probs."""
        expected_log_prob = (copy_probs * log_probs).sum(-1, keepdim=True) / self.config.gate_log_prob_scale
        features = torch.cat([features, expected_log_prob], dim=-1)
        from_features = (features * self.gate_features.float()).sum(-1) + self.gate_bias.float()
        return (hidden_states.float() * self.gate_hidden.float()).sum(-1) + self.config.match_scale * from_features

    def gate_and_attention(
        self, logits: torch.Tensor, hidden_states: torch.Tensor, candidates: CopyCandidates
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gate and the attention distribution of all columns, to show what is copied.

        Args:
            logits: (B, T, V) of the decoder.
            hidden_states: (B, T, d) the decoder's last.

        Returns:
            gate (B, T), 0 for columns that attend to nothing; attention (B, T, k·r) over the
            neighbor tokens.
        """
        plan = candidates.plan
        copy_probs, features, token_ids = self.copy_distribution(candidates)
        log_odds = self._gate_log_odds(hidden_states, features, copy_probs, _log_probs(logits, token_ids))
        log_odds = log_odds + self.gate_scale.float().clamp(min=0.0).log()
        gate = torch.where(plan.can_attend, log_odds.sigmoid(), 0.0)
        return gate, plan.queries.ungroup(self.attention_distribution(candidates)[0])


def _log_probs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the float32 log-probabilities of token_ids (…, N) under logits (…, V)."""
    return logits.gather(-1, token_ids).float() - logits.float().logsumexp(-1, keepdim=True)


def _sum_at(attention: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return attention (N, w, t) summed at the places (N, t), which are the same for all w."""
    return torch.zeros_like(attention).scatter_add(-1, places.unsqueeze(1).expand_as(attention), attention)


def _log1p_scaled_exp(log_evidence: torch.Tensor, gate_scale: torch.Tensor) -> torch.Tensor:
    """Return log(1 + gate_scale · exp(log_evidence)), or 0 if the scale is zero or below.

    A closed gate has the gradient of an open one, so that it can open, and open again.
    """
    gate_scale = _with_gradient_below_zero(gate_scale)
    is_open = gate_scale > 0
    opened = F.softplus(log_evidence + torch.where(is_open, gate_scale, 1.0).log())
    closed = gate_scale * log_evidence.clamp(max=CLOSED_GATE_LIMIT).exp()  # 0, with the gradient there
    return torch.where(is_open, opened, closed)


def _with_gradient_below_zero(gate_scale: torch.Tensor) -> torch.Tensor:
    """Return the scale, 0 if it is below, with the gradient of itself."""
    return gate_scale + (gate_scale.clamp(min=0.0) - gate_scale).detach()


def _rename_old_parameters(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    """Give the parameters of a state dict that is about to be loaded their present names."""
    for old, new in RENAMED_PARAMETERS.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
