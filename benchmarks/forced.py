"""A logits processor that leaves a model no choice, so that all sides write the same real text."""

import time

import torch
from transformers import LogitsProcessor


class Forced(LogitsProcessor):
    """Makes a text the only one that can be written, and notes when each token is.

    Args:
        text: (rows, tokens) int64, prompts and what is to be written.

    Attributes:
        times: the moments of the calls, in seconds.
    """

    def __init__(self, text: torch.Tensor) -> None:
        self.text = text
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (rows, V): the highest is the next token of each text (rows, T)."""
        self.times.append(time.perf_counter())
        place = min(input_ids.shape[1], self.text.shape[1] - 1)  # drafts look beyond the end
        return scores.scatter(1, self.text[:, place].unsqueeze(1), torch.inf)
