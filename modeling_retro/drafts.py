"""Drafts: propose what the neighbors say next, so that one forward yields several tokens.

The model verifies a draft in one forward and keeps the tokens that it would have written itself
(speculative decoding; Leviathan et al., 2023). So the text is that of decoding without drafts:
token for token if decoded greedily, and from the same distribution if sampled.
"""

from collections.abc import Callable, Sequence
from itertools import compress, cycle, islice
from typing import Any, cast

import torch
from transformers import GenerationConfig, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria
from transformers.generation.candidate_generator import CandidateGenerator

from .draft_lengths import MOST_MATCH, DraftCosts, MatchStatistics
from .neighbor_fetching import RetrievalLog, Retriever
from .neighbor_inputs import NeighborInputs

LEAST_MATCH = 2  # tokens that must match
MOST_LENGTH = 48  # tokens of a draft


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


class Passages:
    """The tokens of the text and of neighbors, to find the longest match of the text's end."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self._known: set[tuple[int, ...]] = set()
        # LEAST_MATCH tokens -> where tokens follow them: passages, and places in these
        self._places: dict[tuple[int, ...], list[tuple[list[int], int]]] = {}

    def extend_text(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self.text.append(token)
            self._add_place(self.text, len(self.text) - 1)

    def add(self, tokens: Sequence[int]) -> None:
        """Add a neighbor's tokens, unless they are known."""
        key = tuple(tokens)
        if key not in self._known:
            self._known.add(key)
            passage = list(tokens)
            for place in range(len(passage)):
                self._add_place(passage, place)

    def _add_place(self, passage: list[int], place: int) -> None:
        if place >= LEAST_MATCH:
            before = tuple(passage[place - LEAST_MATCH : place])
            self._places.setdefault(before, []).append((passage, place))

    def continuation(self) -> tuple[list[int], int]:
        """Return what follows the longest match of the text's last tokens, and the match's length.

        Of equally long matches, the one added last counts. Longer ones than `MOST_MATCH` count as
        equally long. Where a match in the text itself leads to the text's end, the text is taken to
        go on in a circle. Without a match of `LEAST_MATCH` tokens, the result is ([], 0).
        """
        best, longest = None, 0
        for passage, place in reversed(self._places.get(tuple(self.text[-LEAST_MATCH:]), [])):
            matched = self._matched(passage, place)
            if matched > longest:
                best, longest = (passage, place), matched
            if longest == MOST_MATCH:
                break
        if best is None:
            return [], 0
        passage, place = best
        following = passage[place : place + MOST_LENGTH]
        if passage is self.text:
            following = list(islice(cycle(following), MOST_LENGTH))
        return following, longest

    def _matched(self, passage: list[int], place: int) -> int:
        """Return how many tokens before a place are the text's last ones."""
        matched, most = LEAST_MATCH, min(MOST_MATCH, place, len(self.text))
        while matched < most and passage[place - 1 - matched] == self.text[-1 - matched]:
            matched += 1
        return matched


class NeighborDrafts(CandidateGenerator):
    """Drafts from the neighbors at hand and from the text itself.

    A draft is what follows the longest match of the text's last tokens. It ends before the next
    retrieval point, since its neighbors are those of the text that is really there. Its length is
    the one that promises to save the most time; if none does, the step goes without a draft.

    Args:
        model: verifies the drafts. Its retriever is asked as soon as the text reaches a point.
        prompt: (1, T) int64. T is 0 if the prompt is given as embeddings.
        log: what this `generate()` has retrieved, with the prompt's mask and the stopping criteria.
        given: the neighbors that `generate()` was given, if any.
        settings: those of `generate()`. A draft ends before the greatest length and before tokens
            that end a text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: torch.Tensor,
        log: RetrievalLog,
        given: NeighborInputs | None,
        settings: GenerationConfig,
    ) -> None:
        assert log.prompt_mask is not None and settings.max_length is not None, "set before"
        self.log, self.max_length, self.chunk_size = log, settings.max_length, model.config.chunk_size
        self.retriever = cast(Retriever | None, model.retriever) if given is None else None
        eos = settings._eos_token_tensor
        self.eos_token_ids = set() if eos is None else set(eos.flatten().tolist())
        known = (MaxLengthCriteria, EosTokenCriteria)  # a draft never goes so far
        self.stops: list[Callable] = [stop for stop in log.stopping_criteria if not isinstance(stop, known)]
        self.costs, self.statistics, self.passages = DraftCosts.of(model), MatchStatistics(), Passages()
        self._columns = prompt.shape[1]  # read so far
        mask = log.prompt_mask[0].bool().tolist()
        self._unknown = sum(mask) if self._columns < len(mask) else 0  # tokens that are given as embeddings
        self.passages.extend_text(list(compress(prompt[0].tolist(), mask)))
        if given is not None:
            self._add_neighbors(given.ids[0].flatten(0, -2), given.mask[0].flatten(0, -2))
        self._retrieved = 0  # queries of the log whose neighbors are passages
        self._proposed: tuple[list[int], int] = ([], 0)

    def get_candidates(self, input_ids: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Return the text (1, T) with a draft behind it: (1, T + n), n from 0 on."""
        points = self.log.points
        if points is None:  # before the first forward, or without neighbors
            return input_ids, None
        new = input_ids[0, self._columns :].tolist()
        self._columns += len(new)
        self.statistics.learn(*self._proposed, new)
        self.passages.extend_text(new)
        length = self._unknown + len(self.passages.text)
        self._read_neighbors(length, is_point=points.after(0, length - 1) == length)
        self._proposed = following, matched = self.passages.continuation()
        room = min(self.max_length - input_ids.shape[1], points.after(0, length) - length) - 1
        draft = following[: self.statistics.best_length(matched, min(room, len(following)), self.costs)]
        draft = draft[: next((place for place, token in enumerate(draft) if token in self.eos_token_ids), len(draft))]
        draft = self._up_to_a_stop(input_ids, draft)
        return torch.cat([input_ids, input_ids.new_tensor([draft])], dim=1) if draft else input_ids, None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Do nothing: the next text shows what was accepted."""

    def _read_neighbors(self, length: int, is_point: bool) -> None:
        """Add new neighbors to the passages. At a point, fetch its neighbors first."""
        query = tuple(self.passages.text[-self.chunk_size :])
        if is_point and self.retriever is not None and len(query) == min(length, self.chunk_size):
            self.log.retrieve(self.retriever, [query])
        for query in self.log.queries()[self._retrieved :]:
            self._add_neighbors(*self.log.tensors(query)[:2])
        self._retrieved = len(self.log)

    def _add_neighbors(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Add neighbors (n, r) to the passages, the best one last."""
        for tokens, is_real in zip(reversed(ids.tolist()), reversed(mask.tolist()), strict=True):
            self.passages.add(list(compress(tokens, is_real)))

    def _up_to_a_stop(self, input_ids: torch.Tensor, draft: list[int]) -> list[int]:
        """Cut a draft before the token at which the text would stop. The model writes that one."""
        if self.stops:
            for end in range(1, len(draft) + 1):
                text = torch.cat([input_ids, input_ids.new_tensor([draft[:end]])], dim=1)
                if any(bool(torch.as_tensor(stop(text, None)).any()) for stop in self.stops):
                    return draft[: end - 1]
        return draft
