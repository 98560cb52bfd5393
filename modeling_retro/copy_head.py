"""The copy head: where a neighbour goes on from tokens like the last ones here, the token that followed there is predicted.

A pointer-generator (Vinyals et al., 2015; See et al., 2017) over the neighbours that chunked cross-attention reads. It needs
few steps to learn, since what cross-attention must first find, that a token of a neighbour says what may follow its like, is
built in.

Shapes: B rows, T tokens of this call, L tokens so far, d hidden size; G groups of at most w readers of one chunk (see
`Readers`); k neighbours a chunk, r tokens a neighbour, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from configuration_retro import RetroConfig

from .cache import RetroCache
from .chunk_grid import ChunkGrid, Movable, take_chunks, take_rows
from .chunked_cross_attention import Reading, fill_chunks
from .neighbor_encoder import open_if_empty

CONTEXT = 3  # tokens that are compared: the last one and the two before it
FEATURES = 5  # of the neighbours, that the gate sees beside the hidden state


@dataclass
class Copying(Movable):
    """What the copy head reads in one call.

    reading:    who reads which chunk.
    context:    (B, T, CONTEXT·d) unit-length token embeddings of each column and those before it, the last token first;
                zero where there is none.
    keys:       (B, G, k·r, d) unit-length token embeddings of the groups' neighbours.
    token_ids:  (B, G, k·r).
    first:      (B, G, k·r) where the same token first occurs in the group's neighbours.
    first_own:  (B, G, k·r) where it first occurs in the same neighbour.
    scores:     (B, G, k) retrieval similarity.
    """

    reading: Reading
    context: torch.Tensor
    keys: torch.Tensor
    token_ids: torch.LongTensor
    first: torch.LongTensor
    first_own: torch.LongTensor
    scores: torch.Tensor


def build_copying(
    grid: ChunkGrid,
    reading: Reading | None,
    token_embeds: torch.Tensor,
    neighbor_ids: torch.LongTensor | None,
    neighbor_embeds: torch.Tensor | None,
    neighbor_mask: torch.BoolTensor | None,
    neighbor_scores: torch.Tensor | None,
    cache: RetroCache | None,
) -> Copying | None:
    """Prepare a call's copying; with a cache, each chunk once.

    Args:
        token_embeds: (B, T, d) of this call's tokens, without positions.
        neighbor_ids, neighbor_embeds, neighbor_mask, neighbor_scores: (B, C, k, r), (B, C, k, r, d), (B, C, k, r) and
            (B, C, k) of the chunks that complete in this call; all None if none does.
    """
    token_embeds = F.normalize(token_embeds, dim=-1)
    if cache is not None:
        token_embeds = cache.append_token_embeds(token_embeds)
    if reading is None:
        return None
    prepared = {}
    if neighbor_ids is not None:
        flat = neighbor_ids.flatten(2)
        prepared = {
            "keys": F.normalize(neighbor_embeds, dim=-1).flatten(2, 3),
            "token_ids": flat,
            "first": _first_occurrences(flat.unsqueeze(2), neighbor_mask.flatten(2).unsqueeze(2)),
            "first_own": _first_occurrences(neighbor_ids, neighbor_mask),
            "scores": neighbor_scores,
        }
    if cache is not None:
        for name, states in prepared.items():
            cache.copy_memory[name] = fill_chunks(cache.copy_memory.get(name), states, reading.slots)
        # as in cross-attention: chunks completed since without neighbours are masked, whatever is read for them
        last = cache.copy_memory["keys"].shape[1] - 1
        prepared = {
            name: take_chunks(states, reading.group_chunks.clamp(max=last))
            for name, states in cache.copy_memory.items()
        }
    columns, exists = grid.columns_before(CONTEXT, token_embeds.shape[1])
    context = torch.where(exists.flatten(1).unsqueeze(-1), take_rows(token_embeds, columns.flatten(1)), 0.0)
    return Copying(reading, context.view(*columns.shape[:2], -1), **prepared)


def _first_occurrences(ids: torch.LongTensor, mask: torch.BoolTensor) -> torch.LongTensor:
    """(B, C, n, t) -> (B, C, n·t): for each token the place, in the n·t, where it first occurs among its t."""
    same = (ids.unsqueeze(-1) == ids.unsqueeze(-2)) & mask.unsqueeze(-2)
    first = same.byte().argmax(-1)
    starts = torch.arange(0, ids.shape[2] * ids.shape[3], ids.shape[3], device=ids.device)
    return (first + starts.unsqueeze(-1)).flatten(2)


class CopyHead(nn.Module):
    """Mixes the decoder's prediction with copying: p = (1 − g) · p_decoder + g · p_copy.

    p_copy is attention over the k·r neighbour tokens that the position may read. Token j's score is a weighted sum of the
    cosine similarities of x_i and n_{j−1}, x_{i−1} and n_{j−2}, x_{i−2} and n_{j−3} (token embeddings), and of the retrieval
    similarity of its neighbour. The odds g / (1 − g) are those of a logistic regression on the decoder's last hidden state
    and on what tells good neighbours from bad, times a valve that starts at zero: until trained, the logits are GPT-2's.
    """

    def __init__(self, config: RetroConfig):
        super().__init__()
        self.match = nn.Parameter(torch.empty(CONTEXT))
        self.similarity = nn.Parameter(torch.empty(1))
        self.gate = nn.Parameter(torch.empty(config.n_embd + FEATURES))
        self.gate_bias = nn.Parameter(torch.empty(1))
        self.valve = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        init.copy_(self.match, torch.tensor([8.0, 6.0, 4.0]))
        init.zeros_(self.similarity)
        init.zeros_(self.gate)
        # after a first step of 1e-3 or so, the valve and this bias let through odds of about a tenth
        init.constant_(self.gate_bias, 4.0)
        init.zeros_(self.valve)

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
        plausibility = (mass * log_probs).sum(-1, keepdim=True) / 10
        known = torch.cat([hidden_states.float(), features, plausibility], dim=-1)
        log_odds = known @ self.gate.float() + self.gate_bias.float()
        copied = mass > 0
        evidence = log_odds.unsqueeze(-1) + mass.masked_fill(~copied, 1.0).log() - log_probs
        # logits may be shifted by a constant: (1 − g) · p + g · c is p · (1 + odds · c / p), up to normalisation
        boost = torch.where(copied, _log1p_exp(evidence, self.valve.float()), 0.0)
        return logits.scatter_add(-1, token_ids, boost.to(logits.dtype))

    def attend(self, copying: Copying) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
        """Where each column looks.

        Returns:
            mass (B, T, k·r) float32: probability of each token that is copied, where it first occurs; 0 elsewhere, and
            where a column reads nothing. features (B, T, FEATURES - 1) for the gate. token_ids (B, T, k·r).
        """
        readers, mask = copying.reading.readers, copying.reading.group_mask
        num_neighbors, width = copying.scores.shape[-1], readers.width
        groups = mask.shape[0] * mask.shape[1]
        queries = readers.group(copying.context).view(groups, width * CONTEXT, -1)
        cosines = (queries @ copying.keys.flatten(0, 1).transpose(1, 2)).float()
        cosines = cosines.view(groups, width, CONTEXT, num_neighbors, -1)
        # the token that followed is the one to copy: one place further than the last token's like
        score = sum(
            weight * F.pad(cosines[:, :, place], (place + 1, 0))[..., : cosines.shape[-1]]
            for place, weight in enumerate(self.match.float())
        ).flatten(2)
        scores = copying.scores.float().flatten(0, 1).repeat_interleave(score.shape[-1] // num_neighbors, dim=-1)
        scores = scores.unsqueeze(1)  # (B·G, 1, k·r)
        lowest = torch.finfo(torch.float32).min
        hidden = ~open_if_empty(mask).flatten(0, 1).unsqueeze(1)
        weights = (score + self.similarity.float() * scores).masked_fill(hidden, lowest).softmax(-1)
        mass = _sum_at(weights, copying.first.flatten(0, 1))
        by_neighbor = _sum_at(weights, copying.first_own.flatten(0, 1))
        sharpness = mass.square().sum(-1)
        features = torch.stack(
            [
                score.masked_fill(hidden, lowest).amax(-1) / 10,  # how well the best place fits
                sharpness,
                sharpness - by_neighbor.square().sum(-1),  # how much of it the neighbours say alike
                (weights * scores).sum(-1),  # retrieval similarity of what is copied
            ],
            dim=-1,
        )
        token_ids = copying.token_ids.flatten(0, 1).unsqueeze(1).expand(-1, width, -1)
        readable = copying.reading.readable.unsqueeze(-1)
        return (
            torch.where(readable, readers.ungroup(mass), 0.0),
            torch.where(readable, readers.ungroup(features), 0.0),
            readers.ungroup(token_ids),
        )


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
