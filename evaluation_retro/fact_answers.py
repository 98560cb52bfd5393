"""Ask a model questions: the answer that it writes, and how likely it finds each of several.

Shapes: B prompts, n candidates of each, V vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from modeling_retro.library import CACHE
from retrieval import BulkTokenizer

ARTICLES = {"a", "an", "the"}
GROUPED_DIGITS = re.compile(r"(?<=\d),(?=\d{3}\b)")  # 12,345
WORD = re.compile(r"\w+")


def normalized(text: str) -> str:
    """Return the words of a text's first line: in lower case, without punctuation and articles.

    Commas that group the digits of a number are left out.
    """
    line = text.strip().partition("\n")[0]
    words = WORD.findall(GROUPED_DIGITS.sub("", line).lower())
    return " ".join(word for word in words if word not in ARTICLES)


def is_exact_match(written: str, answer: str) -> bool:
    """Return True if what a model wrote begins with the answer, in whole words.

    A base model does not stop after the answer: it goes on with its sentence.
    """
    return f"{normalized(written)} ".startswith(f"{normalized(answer)} ")


def ranks(log_likelihoods: np.ndarray) -> np.ndarray:
    """Return the rank (N,), from 1 on, of the first of n candidates; ties count against it.

    Args:
        log_likelihoods: (N, n).
    """
    return 1 + (log_likelihoods[:, 1:] >= log_likelihoods[:, :1]).sum(1)


@dataclass
class Prompts:
    """Prompts of one batch with their candidates, as token ids.

    Attributes:
        tokens: B prompts.
        candidates: for each prompt n answers, which continue it.
    """

    tokens: Sequence[Sequence[int]]
    candidates: Sequence[Sequence[Sequence[int]]]

    @classmethod
    def encode(cls, tokenizer: BulkTokenizer, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> "Prompts":
        """Encode texts. A prompt begins as a text of its own does.

        Raises:
            ValueError: the tokenizer has no end-of-text token.
        """
        begin = first_token(tokenizer)
        tokens = [[begin, *its] for its in tokenizer.encode_batch(prompts)]
        return cls(tokens, [tokenizer.encode_continuations([f" {answer}" for answer in its]) for its in candidates])


def first_token(tokenizer: BulkTokenizer) -> int:
    """Return the token that begins a text: the tokenizer's own, or else end-of-text.

    Raises:
        ValueError: it has neither.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError("The tokenizer has no end-of-text token to begin a question with. Set its eos_token.")
    return first


@torch.no_grad()
def ask(
    model: PreTrainedModel, prompts: Prompts, new_tokens: int, padding: int, arguments: Mapping[str, Any]
) -> tuple[list[list[int]], np.ndarray]:
    """Let a model continue prompts greedily, and compute how likely the candidates are.

    The prompts are read once: the candidates are computed with the cache that `generate()` leaves.

    Args:
        model: a causal language model, RETRO or not, in evaluation mode.
        prompts: B prompts with n candidates each.
        new_tokens: tokens to write.
        padding: a token id to pad with.
        arguments: for `generate()` and forward, such as {"use_retrieval": False}.

    Returns:
        the tokens that were written after each prompt, and the candidates' log-likelihoods (B, n).
    """
    longest = max(map(len, prompts.tokens))
    ids = [[padding] * (longest - len(tokens)) + [*tokens] for tokens in prompts.tokens]
    mask = [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts.tokens]
    input_ids, attention_mask = (torch.tensor(rows, device=model.device) for rows in (ids, mask))
    output = model.generate(  # type: ignore[operator]
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=padding,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    cache: Cache = output[CACHE]
    if written := int(cache.get_seq_length()) - longest:
        cache.crop(-written)
    scores = _log_likelihoods(model, prompts, output.logits[0], attention_mask, cache, arguments)
    return output.sequences[:, longest:].tolist(), scores.cpu().numpy()


def _log_likelihoods(
    model: PreTrainedModel,
    prompts: Prompts,
    first_logits: torch.Tensor,  # (B, V) after the prompts
    attention_mask: torch.Tensor,  # (B, T) of the prompts
    cache: Cache,  # with the prompts alone, before and after
    arguments: Mapping[str, Any],
) -> torch.Tensor:
    """Return Σ log p(candidate | prompt), (B, n)."""
    device, number = model.device, len(prompts.candidates[0])
    scores = []
    for place in range(number):
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(candidates[place]) for candidates in prompts.candidates], batch_first=True
        ).to(device)  # (B, L)
        lengths = torch.tensor([len(candidates[place]) for candidates in prompts.candidates], device=device)
        logits = first_logits.unsqueeze(1)
        if (more := padded.shape[1] - 1) > 0:
            following = model(
                input_ids=padded[:, :-1],
                attention_mask=torch.cat([attention_mask, attention_mask.new_ones(len(padded), more)], 1),
                position_ids=attention_mask.sum(1, keepdim=True) + torch.arange(more, device=device),
                use_cache=True,
                **{CACHE: cache},
                **arguments,
            ).logits
            logits = torch.cat([logits, following], 1)
            cache.crop(-more)
        log_probs = logits.float().log_softmax(-1).gather(2, padded.unsqueeze(2)).squeeze(2)
        is_real = torch.arange(padded.shape[1], device=device) < lengths.unsqueeze(1)
        scores.append((log_probs * is_real).sum(1))
    return torch.stack(scores, 1)
