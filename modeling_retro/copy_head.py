"""The copy head: where a neighbor goes on from tokens like the last ones here, the token that followed there is predicted.

A pointer-generator (Vinyals et al., 2015; See et al., 2017) over the neighbors that chunked cross-attention reads. It needs
few steps to learn, since what the paper's cross-attention must first find, that a token of a neighbor says what may follow
its like, is built in.

Shapes: B rows, T tokens of this call, d hidden size; G groups of at most w readers of one chunk (see
`Readers`); k neighbors a chunk, r tokens a neighbor, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from configuration_retro import RetroConfig

from .chunk_grid import Movable
from .matching import CONTEXT, MATCH_WEIGHTS, SCALE
from .reading import Reading, remember_chunks

FEATURES = 4 + CONTEXT  # of what is copied, that the gate sees beside the hidden state


@dataclass
class Copying(Movable):
    """The copy head's inputs in one call.

    reading:    who reads which chunk, and how well the last tokens match there.
    token_ids:  (B, G, k·r) of the groups' neighbors.
    first:      (B, G, k·r) where the same token first occurs in the group's neighbors.
    first_own:  (B, G, k·r) where it first occurs in the same neighbor.
    scores:     (B, G, k) retrieval similarity.
    """

    reading: Reading
    token_ids: torch.LongTensor
    first: torch.LongTensor
    first_own: torch.LongTensor
    scores: torch.Tensor


def build_copying(
    reading: Reading,
    neighbor_ids: torch.LongTensor | None,
    neighbor_mask: torch.BoolTensor | None,
    neighbor_scores: torch.Tensor | None,
) -> Copying:
    """Prepare a call's copying; with a cache, each chunk once.

    Args:
        neighbor_ids, neighbor_mask, neighbor_scores: (B, C, k, r), (B, C, k, r) and (B, C, k) of the chunks that complete in
            this call; all None if none does.
    """
    new = {}
    if neighbor_ids is not None:
        flat = neighbor_ids.flatten(2)
        new = {
            "token_ids": flat,
            "first": _first_occurrences(flat.unsqueeze(2), neighbor_mask.flatten(2).unsqueeze(2)),
            "first_own": _first_occurrences(neighbor_ids, neighbor_mask),
            "scores": neighbor_scores,
        }
    return Copying(reading, **remember_chunks(reading, "copy", new))


def _first_occurrences(ids: torch.LongTensor, mask: torch.BoolTensor) -> torch.LongTensor:
    """(B, C, n, t) -> (B, C, n·t): for each token the place, in the n·t, where it first occurs among its t."""
    same = (ids.unsqueeze(-1) == ids.unsqueeze(-2)) & mask.unsqueeze(-2)
    first = same.byte().argmax(-1)
    starts = torch.arange(0, ids.shape[2] * ids.shape[3], ids.shape[3], device=ids.device)
    return (first + starts.unsqueeze(-1)).flatten(2)


class CopyHead(nn.Module):
    """Mixes the decoder's prediction with copying: p = (1 − g) · p_decoder + g · p_copy.

    p_copy is attention over the k·r neighbor tokens that the position may read. A token's score is a weighted sum of how well
    the last 1, 2, … CONTEXT tokens here match those before it (see `match_context`) and of the similarity with which its
    neighbor was retrieved.

    The odds g / (1 − g) are those of a logistic regression on the decoder's last hidden state and on what tells good neighbors
    from bad (see `attend`), times a valve that starts at zero: until trained, the logits are GPT-2's.
    """

    def __init__(self, config: RetroConfig):
        super().__init__()
        self.match = nn.Parameter(torch.empty(CONTEXT))
        self.similarity = nn.Parameter(torch.empty(1))
        self.gate_hidden = nn.Parameter(torch.empty(config.n_embd))
        self.gate_features = nn.Parameter(torch.empty(FEATURES))
        self.gate_bias = nn.Parameter(torch.empty(1))
        self.valve = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        init.copy_(self.match, torch.tensor(MATCH_WEIGHTS))
        for parameter in (self.similarity, self.gate_hidden, self.gate_features, self.gate_bias, self.valve):
            init.zeros_(parameter)

    def forward(
        self,
        logits: torch.Tensor,  # (B, T', V), of the columns alone
        hidden_states: torch.Tensor,  # (B, T', d)
        copying: Copying,
        columns: slice | torch.Tensor,  # of the call's T
    ) -> torch.Tensor:  # (B, T', V)
        mass, features, token_ids = (states[:, columns] for states in self.attend(copying))
        # in log space, and float32 whatever the model's type
        log_probs = logits.gather(-1, token_ids).float() - logits.float().logsumexp(-1, keepdim=True)
        log_odds = self.log_odds(hidden_states, features, mass, log_probs)
        copied = mass > 0
        evidence = log_odds.unsqueeze(-1) + mass.masked_fill(~copied, 1.0).log() - log_probs
        # logits may be shifted by a constant: (1 − g) · p + g · c is p · (1 + odds · c / p), up to normalization
        boost = torch.where(copied, _log1p_exp(evidence, self.valve.float()), 0.0)
        return logits.scatter_add(-1, token_ids, boost.to(logits.dtype))

    def log_odds(
        self, hidden_states: torch.Tensor, features: torch.Tensor, mass: torch.Tensor, log_probs: torch.Tensor
    ) -> torch.Tensor:
        """log g / (1 − g), but for the valve, (B, T'); mass and the decoder's log_probs (B, T', k·r) of the copied tokens."""
        plausibility = (mass * log_probs).sum(-1, keepdim=True) / 10  # of what is copied, to the decoder
        known = torch.cat([features, plausibility], dim=-1)
        learned = (known * self.gate_features.float()).sum(-1) + self.gate_bias.float()
        return (hidden_states.float() * self.gate_hidden.float()).sum(-1) + SCALE * learned

    def attend(self, copying: Copying) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
        """Compute the copy distribution and the gate's features.

        Returns:
            mass (B, T, k·r) float32: probability of each token that is copied, where it first occurs; 0 elsewhere, and
            where a column reads nothing. features (B, T, FEATURES - 1) for the gate: how well the last 1, 2, … tokens match
            where it looks, the sharpness of the mass, how much of it the neighbors say alike, and their retrieval
            similarity. token_ids (B, T, k·r).
        """
        readers = copying.reading.readers
        weights, scores = self.weights(copying)
        mass = _sum_at(weights, copying.first.flatten(0, 1))
        by_neighbor = _sum_at(weights, copying.first_own.flatten(0, 1))
        sharpness = mass.square().sum(-1)
        alike = sharpness - by_neighbor.square().sum(-1)
        similarity = (weights * scores).sum(-1)
        features = [*(weights * copying.reading.matches).sum(-1), sharpness, alike, similarity]
        token_ids = copying.token_ids.flatten(0, 1).unsqueeze(1).expand(-1, readers.width, -1)
        readable = copying.reading.readable.unsqueeze(-1)
        return (
            torch.where(readable, readers.ungroup(mass), 0.0),
            torch.where(readable, readers.ungroup(torch.stack(features, dim=-1)), 0.0),
            readers.ungroup(token_ids),
        )

    def looks(
        self, logits: torch.Tensor, hidden_states: torch.Tensor, copying: Copying
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a trained model looks, of all columns of a call.

        Returns:
            the gate g (B, T), 0 where a column reads nothing, and the attention (B, T, k·r) over the tokens to copy.
        """
        mass, features, token_ids = self.attend(copying)
        log_probs = logits.gather(-1, token_ids).float() - logits.float().logsumexp(-1, keepdim=True)
        log_odds = self.log_odds(hidden_states, features, mass, log_probs) + self.valve.float().clamp(min=0.0).log()
        gate = torch.where(copying.reading.readable, log_odds.sigmoid(), 0.0)
        return gate, copying.reading.readers.ungroup(self.weights(copying)[0])

    def weights(self, copying: Copying) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the neighbor tokens of each group, the token to copy being the one looked at.

        Returns:
            weights (B·G, w, k·r) float32; the retrieval similarity of each place's neighbor (B·G, 1, k·r).
        """
        places = copying.token_ids.shape[-1] // copying.scores.shape[-1]  # of a neighbor
        scores = copying.scores.float().flatten(0, 1).repeat_interleave(places, dim=-1).unsqueeze(1)
        fit = (SCALE * self.match.float().view(-1, 1, 1, 1) * copying.reading.matches).sum(0)
        fit = fit + SCALE * self.similarity.float() * scores
        return fit.masked_fill(copying.reading.hidden.unsqueeze(1), torch.finfo(fit.dtype).min).softmax(-1), scores


def _sum_at(weights: torch.Tensor, places: torch.LongTensor) -> torch.Tensor:
    """weights (N, w, t) summed where `places` (N, t) says, the same for all w."""
    return torch.zeros_like(weights).scatter_add(-1, places.unsqueeze(1).expand_as(weights), weights)


def _log1p_exp(evidence: torch.Tensor, valve: torch.Tensor) -> torch.Tensor:
    """log(1 + valve · exp(evidence)); a valve of zero, or one that training has pushed below, lets nothing through.

    Its gradient is that of an open valve, so that it can open, and open again.
    """
    valve = valve + (valve.clamp(min=0.0) - valve).detach()
    is_open = valve > 0
    through = F.softplus(evidence + torch.where(is_open, valve, 1.0).log())
    closed = valve * evidence.clamp(max=8.0).exp()  # 0, with the gradient there
    return torch.where(is_open, through, closed)
