"""Drafts: propose what the neighbors say next, so that one forward yields several tokens.

The model verifies a draft in one forward and keeps the tokens that it would have written itself
(speculative decoding; Leviathan et al., 2023). So the text is that of decoding without drafts:
token for token if decoded greedily, and from the same distribution if sampled.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria
from transformers.generation.candidate_generator import CandidateGenerator

from .neighbor_fetching import RetrievalLog
from .neighbor_inputs import NeighborInputs

LEAST_MATCH, MOST_MATCH = 2, 16  # tokens that must be, and that are, compared
FIRST_LENGTH, MOST_LENGTH = 8, 48  # tokens of a draft
MOST_REST = 32  # steps without a draft after drafts that failed
NOTHING = -1  # between passages: no token


class AfterPrompt(StoppingCriteriaList):
    """Stopping criteria that never stop at the prompt, as decoding without drafts does not.

    Args:
        criteria: those of `generate()`.
        prompt_length: columns of the prompt.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompt_length: int) -> None:
        super().__init__(criteria)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """Return True for each row (B,) that stops."""
        if input_ids.shape[1] <= self.prompt_length:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return super().__call__(input_ids, scores, **kwargs)


class NeighborDrafts(CandidateGenerator):
    """Drafts from the neighbors at hand, and from the text itself where they have no match.

    A draft is what follows the longest match of the text's last tokens. It ends before the next
    retrieval point, since its neighbors are those of the text that is really there. Accepted drafts
    make the next ones longer. After drafts of which nothing is accepted, some steps go without.

    Args:
        log: what this `generate()` has retrieved, and where its points lie.
        given: the neighbors that `generate()` was given, if any.
        max_length: tokens of prompt and continuation at most.
        stopping_criteria: those of `generate()`.
        eos_token_ids: tokens that end a text; a draft ends before them.
    """

    def __init__(
        self,
        log: RetrievalLog,
        given: NeighborInputs | None,
        max_length: int,
        stopping_criteria: StoppingCriteriaList,
        eos_token_ids: torch.Tensor | None,
    ) -> None:
        self.log, self.max_length = log, max_length
        self.eos_token_ids = set() if eos_token_ids is None else set(eos_token_ids.flatten().tolist())
        known = (MaxLengthCriteria, EosTokenCriteria)  # a draft never goes so far
        self.stops: list[Callable] = [stop for stop in stopping_criteria if not isinstance(stop, known)]
        self.passages = _joined(given.ids[0], given.mask[0]) if given is not None else torch.empty(0, dtype=torch.long)
        self._retrieved = 0  # of the log, in `passages`
        self.length, self.rest, self._pause, self._drafted = FIRST_LENGTH, 0, 0, 0

    def get_candidates(self, input_ids: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Return the text (1, T) with a draft behind it: (1, T + n), n from 0 on."""
        draft = [] if self._pause else self._up_to_a_stop(input_ids, self._draft(input_ids[0].cpu()))
        self._drafted = len(draft)
        return torch.cat([input_ids, input_ids.new_tensor([draft])], dim=1) if draft else input_ids, None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Adapt the length of the next draft to the number of tokens that were accepted."""
        accepted = int(num_matches)
        if not self._drafted:
            self._pause = max(0, self._pause - 1)
        elif accepted:
            self.rest = 0
            is_whole = accepted >= self._drafted
            self.length = min(2 * self.length, MOST_LENGTH) if is_whole else max(accepted + 1, LEAST_MATCH)
        else:
            self.length = max(self.length // 2, LEAST_MATCH)
            self.rest = self._pause = min(max(1, 2 * self.rest), MOST_REST)

    def _draft(self, text: torch.Tensor) -> list[int]:
        room = min(self.length, self.max_length - len(text) - 1, self._before_the_next_point(len(text)))
        if room < 1:
            return []
        if len(self.log) > self._retrieved:
            new = [_joined(*self.log.tensors(query)[:2]) for query in self.log.queries()[self._retrieved :]]
            self._retrieved = len(self.log)
            self.passages = torch.cat([*reversed(new), self.passages])
        matches = (continuation(text, where, room) for where in (self.passages, text))
        draft, _ = max(matches, key=lambda match: match[1])  # the first of equals
        end = next((place for place, token in enumerate(draft) if token in self.eos_token_ids), len(draft))
        return draft[:end]

    def _before_the_next_point(self, columns: int) -> int:
        """Return how many tokens can be drafted before one of them would end a query.

        None before the first forward, which sets the points.
        """
        points, mask = self.log.points, self.log.prompt_mask
        if points is None or mask is None:
            return 0
        if columns < mask.shape[1]:  # a prompt of embeddings, which is not in the text
            columns += mask.shape[1]
        length = columns - int((mask[0] == 0).sum())
        return points.after(0, length) - length - 1

    def _up_to_a_stop(self, input_ids: torch.Tensor, draft: list[int]) -> list[int]:
        """Cut a draft before the token at which the text would stop. The model writes that one."""
        if self.stops:
            for end in range(1, len(draft) + 1):
                text = torch.cat([input_ids, input_ids.new_tensor([draft[:end]])], dim=1)
                if any(bool(torch.as_tensor(stop(text, None)).any()) for stop in self.stops):
                    return draft[: end - 1]
        return draft


def _joined(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the tokens of neighbors (…, r) one after another, with a gap behind each."""
    rows, real = ids.cpu().flatten(0, -2), mask.cpu().bool().flatten(0, -2)
    tokens = rows.masked_fill(~real, NOTHING)
    return torch.cat([tokens, tokens.new_full((len(tokens), 1), NOTHING)], dim=1).flatten()


def continuation(text: torch.Tensor, where: torch.Tensor, most: int) -> tuple[list[int], int]:
    """Return what follows the longest match of a text's last tokens, and the length of the match.

    Args:
        text: (T,) int64.
        where: (n,) int64, tokens to look in, negative between passages.
        most: tokens to return at most.

    Returns:
        No tokens and 0 if fewer than `LEAST_MATCH` tokens match.
    """
    places = (where[:-1] == text[-1]).nonzero().flatten()
    matched = 1
    while len(places) and matched < min(MOST_MATCH, len(text)):
        longer = places[places >= matched]
        longer = longer[where[longer - matched] == text[-1 - matched]]
        if not len(longer):
            break
        places, matched = longer, matched + 1
    if not len(places) or matched < LEAST_MATCH:
        return [], 0
    start = int(places[0]) + 1
    following = where[start : start + most].tolist()
    end = following.index(NOTHING) if NOTHING in following else len(following)
    return (following[:end], matched) if end else ([], 0)
