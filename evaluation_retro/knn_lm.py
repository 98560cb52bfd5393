"""kNN-LM: the decoder mixed with what followed its nearest states (Khandelwal et al., 2020).

A key is the decoder's last hidden state at a token of a text, the state that enters the output
embeddings. Its value is the next token. At each position the k keys nearest to the decoder's state
vote for their values:

    p = w · softmax(−d² / temperature), summed by token, + (1 − w) · p_decoder

with d² the squared distance. The keys are those of the knowledge base's own texts; see
[`evaluation_retro.key_building`]. k, w and the temperature are chosen on training data.

Shapes: B rows of T tokens, k keys found for each position, V vocabulary.
"""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .in_context import Progress
from .key_building import output_states
from .key_store import KeyStore

ROWS = 4  # of texts that the decoder reads at a time
MOST_FOUND = 64  # keys that are found for each position, of which the best number is chosen
COUNTS = (4, 16, 64)  # values of k to choose from
WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)  # values of w to choose from
TEMPERATURES = (0.03, 0.1, 0.3, 1.0)  # in units of the nearest keys' mean squared distance


@dataclass(frozen=True)
class KnnSettings:
    """The settings of the mixture.

    Attributes:
        k: keys that vote at each position.
        weight: w, the share of their vote, above 0 and below 1.
        temperature: divides the squared distances.
    """

    k: int
    weight: float
    temperature: float

    def votes(self, distances: torch.Tensor) -> torch.Tensor:
        """Return the votes (..., k) of keys with these squared distances (..., k or more).

        They add up to 1, or are all 0 where no key was found (an infinite distance).
        """
        near = distances[..., : self.k]
        return (-near / self.temperature).softmax(-1).masked_fill(near.isinf(), 0.0)

    def mixed(self, log_probs: torch.Tensor, distances: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mixture's log-probabilities (n, V).

        Args:
            log_probs: (n, V) of the decoder.
            distances, tokens: (n, k) of the keys found.
        """
        votes = self.votes(distances)
        voted = torch.zeros_like(log_probs).scatter_add_(1, tokens[:, : self.k], votes.to(log_probs.dtype))
        mixture = torch.logaddexp(math.log1p(-self.weight) + log_probs, (self.weight * voted).log())
        return torch.where(votes.sum(-1, keepdim=True) > 0, mixture, log_probs)


@dataclass
class KeysFound:
    """The keys found for the positions of texts: all that any settings of the mixture need.

    The tensors are on the CPU.

    Attributes:
        nats: (B, T − 1) float32 of the decoder alone, nan where nothing is predicted.
        distances: (B, T − 1, k) float32, squared, nearest first; infinite where there is no key.
        hits: (B, T − 1, k) bool, True where a key's token is the one to predict.
    """

    nats: torch.Tensor
    distances: torch.Tensor
    hits: torch.Tensor

    def mixed(self, settings: KnnSettings) -> torch.Tensor:
        """Return the nats (B, T − 1) under the mixture, nan where nothing is predicted.

        Raises:
            ValueError: fewer keys were found than the settings need.
        """
        if settings.k > self.distances.shape[-1]:
            raise ValueError(
                f"k is {settings.k}, but {self.distances.shape[-1]} keys were found for each position. Find more."
            )
        votes = settings.votes(self.distances)
        voted = (votes * self.hits[..., : settings.k]).sum(-1)
        mixture = torch.logaddexp(math.log1p(-settings.weight) - self.nats, (settings.weight * voted).log())
        return torch.where(votes.sum(-1) > 0, -mixture, self.nats)


def choose_knn(found: Sequence[KeysFound]) -> KnnSettings:
    """Return the settings of a small grid under which training data have the fewest nats.

    Args:
        found: of training texts, whose own documents were excluded.

    Raises:
        ValueError: no key was found for any position.
    """
    nearest = torch.cat([part.distances[..., 0].flatten() for part in found])
    nearest = nearest[nearest.isfinite()]
    if not len(nearest):
        raise ValueError("No key was found for any training text. Build the keys of documents that are not their own.")
    most = min(part.distances.shape[-1] for part in found)
    counts = [k for k in COUNTS if k <= most] or [most]
    unit = max(float(nearest.double().mean()), torch.finfo(torch.float32).tiny)
    grid = [KnnSettings(k, w, t * unit) for k, w, t in itertools.product(counts, WEIGHTS, TEMPERATURES)]
    totals = [sum(float(part.mixed(settings).double().nansum()) for part in found) for settings in grid]
    return grid[int(np.argmin(totals))]


@torch.no_grad()
def find_keys(
    decoder: PreTrainedModel,
    keys: KeyStore,
    input_ids: torch.Tensor,
    exclude_doc_ids: Sequence[Collection[str]] | None = None,
    k: int = MOST_FOUND,
    first: int = 0,
    progress: Progress = iter,
) -> KeysFound:
    """Find the keys nearest to the positions of texts.

    Args:
        decoder: the causal language model of transformers that the keys were made with, in
            evaluation mode, on the device of `input_ids`.
        keys: as [`build_keys`] returns them.
        input_ids: (B, T) int64, rows padded on the right.
        exclude_doc_ids: for each row, documents whose keys are left out: its own.
        k: keys to find for each position.
        first: the first position whose next token is predicted. Later ones follow to the end.
        progress: goes through the numbers of batches, and may show a bar.
    """
    rows, length = input_ids.shape
    shape = (rows, length - 1, k)
    found = KeysFound(
        torch.full(shape[:2], torch.nan), torch.full(shape, torch.inf), torch.zeros(shape, dtype=torch.bool)
    )
    columns = torch.arange(first, length - 1, device=input_ids.device)
    for start in progress(range(0, rows, ROWS)):
        batch = input_ids[start : start + ROWS]
        with output_states(decoder) as states:
            logits = decoder(input_ids=batch, logits_to_keep=columns, use_cache=False).logits.float()
        targets = batch[:, first + 1 :]
        nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        excluded = None
        if exclude_doc_ids is not None:
            own = exclude_doc_ids[start : start + ROWS]
            excluded = [ids for ids in own for _ in range(len(columns))]
        distances, tokens = keys.search(states[0].float().flatten(0, 1).cpu().numpy(), k, excluded)
        here = slice(start, start + ROWS), slice(first, None)
        found.nats[here] = nats.cpu()
        found.distances[here] = torch.from_numpy(distances).view(len(batch), -1, k)
        there = found.distances[here].isfinite()
        found.hits[here] = there & (torch.from_numpy(tokens).view(len(batch), -1, k) == targets.cpu()[..., None])
    return found
