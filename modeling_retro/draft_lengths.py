"""The lengths of drafts: a draft is worth its cost if enough of its tokens will be accepted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

MOST_MATCH = 16  # tokens that are compared; longer matches count as this long
PRIOR_WEIGHT = 2.0  # observations that a first guess counts for
FADING = 0.97  # what an observation's weight is multiplied by with each later one


@dataclass(frozen=True)
class DraftCosts:
    """The time that a forward with a draft of n tokens takes beyond one without: fixed + each · n.

    Attributes:
        fixed, each: in forwards of one token.
    """

    fixed: float
    each: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> "DraftCosts":
        """Return the costs for the model's kind of device and number format.

        They are those of GPT-2 and SmolLM2 on two CPU cores. There, a product of a float32 matrix
        with two vectors takes almost twice as long as with one; in bfloat16 it takes no longer.
        Other devices get the costs of bfloat16.
        """
        is_cpu_in_float32 = model.device.type == "cpu" and model.dtype == torch.float32
        return cls(0.7, 0.03) if is_cpu_in_float32 else cls(0.05, 0.025)


class MatchStatistics:
    """The chance that a text goes on as a matching passage does, by the length of the match.

    Every proposal counts, drafted or not. So drafts end where they are seldom right, and begin
    again where they would be. Older observations fade.
    """

    def __init__(self) -> None:
        guesses = [length / (length + PRIOR_WEIGHT) for length in range(MOST_MATCH + 1)]
        self._hits = [PRIOR_WEIGHT * guess for guess in guesses]
        self._seen = [PRIOR_WEIGHT] * len(guesses)

    def learn(self, proposed: Sequence[int], matched: int, written: Sequence[int]) -> None:
        """Compare what followed a match with what was written.

        Args:
            proposed: tokens that followed in the passage.
            matched: tokens that matched before them.
            written: tokens of the text from the same place on.
        """
        for distance, (guess, token) in enumerate(zip(proposed, written, strict=False)):
            length = min(matched + distance, MOST_MATCH)
            self._hits[length] = FADING * self._hits[length] + (guess == token)
            self._seen[length] = FADING * self._seen[length] + 1
            if guess != token:
                break

    def best_length(self, matched: int, most: int, costs: DraftCosts) -> int:
        """Return the length of draft, from 0 to `most`, that is expected to save the most time.

        Args:
            matched: tokens that match before the draft.
        """
        best_gain, best, accepted, chance = 0.0, 0, 0.0, 1.0
        for length in range(1, most + 1):
            before = min(matched + length - 1, MOST_MATCH)
            chance *= self._hits[before] / self._seen[before]
            accepted += chance
            gain = accepted - costs.fixed - costs.each * length
            if gain > best_gain:
                best_gain, best = gain, length
        return best
