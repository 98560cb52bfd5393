"""Score continuations of texts by log-likelihood, with a retrieval point at each text's end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_retro.retrieval_points import aligned_first_point


@dataclass
class Continuation:
    """A text and its continuation, whose tokens are scored.

    Attributes:
        tokens: all of them, the continuation last. The model reads all but the last one.
        length: tokens of the continuation.
        is_aligned: True places a retrieval point at the text's end, whatever its length: a short
            question is searched for, too. False places the points as in the paper.
    """

    tokens: list[int]
    length: int
    is_aligned: bool = True

    @property
    def start(self) -> int:
        """The tokens before the continuation."""
        return len(self.tokens) - self.length


@torch.no_grad()
def score_continuations(
    model: Any, batch: Sequence[Continuation], padding: int, model_arguments: Mapping[str, Any]
) -> list[tuple[float, bool]]:
    """Return Σ log p(continuation | text) in nats, and True if greedy decoding would write it.

    Args:
        model: a RETRO model, also with adapters.
        batch: the rows of one forward pass.
        padding: the id of a token for padding, on the right.
        model_arguments: passed to the forward pass, such as {"use_retrieval": False}.
    """
    config, device = model.config, model.device
    read = [torch.tensor(row.tokens[:-1]) for row in batch]
    first_points = [
        aligned_first_point(row.start if row.is_aligned else 0, config.chunk_size, config.retrieval_stride)
        for row in batch
    ]
    ids = pad_sequence(read, batch_first=True, padding_value=padding)
    mask = pad_sequence([torch.ones_like(row) for row in read], batch_first=True)
    first_column = min(row.start - 1 for row in batch)  # predicts the first token that is scored
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        first_point=torch.tensor(first_points, device=device),
        logits_to_keep=ids.shape[1] - first_column,
        **model_arguments,
    ).logits
    scores = []
    for row, row_logits in zip(batch, logits, strict=True):
        place = row.start - 1 - first_column
        log_probs = row_logits[place : place + row.length].float().log_softmax(-1)
        targets = torch.tensor(row.tokens[row.start :], device=log_probs.device)
        score = log_probs.gather(1, targets[:, None]).sum()
        scores.append((float(score), bool((log_probs.argmax(-1) == targets).all())))
    return scores
