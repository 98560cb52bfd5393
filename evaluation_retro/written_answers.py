"""Let a model write short answers, and score them by exact match and F1.

The scores are those of SQuAD (Rajpurkar et al., 2016, section 6.1).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from retrieval import BulkTokenizer

ANSWER_TOKENS = 32  # written at most
ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class AnswerWriter:
    """Writes the first line of a prompt's greedy continuation.

    The end of a prompt is a retrieval point, whatever its length.

    Args:
        model: a RETRO model, also with adapters.
        batch_size: prompts that are continued together.
        model_arguments: passed to `generate()`, such as {"use_retrieval": False}.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """

    def __init__(
        self, model: Any, tokenizer: BulkTokenizer, batch_size: int, model_arguments: Mapping[str, Any]
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-text token to begin a question with. Set its eos_token.")
        self.model, self.tokenizer, self.end = model, tokenizer, tokenizer.eos_token_id
        self.begin = self.end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.batch_size, self.model_arguments = batch_size, model_arguments

    @torch.no_grad()
    def write(self, prompts: Sequence[str]) -> list[str]:
        """Return an answer to each prompt. A prompt that is too long loses its beginning."""
        most = self.model.config.n_positions
        new_tokens = min(ANSWER_TOKENS, most // 2)
        answers: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            texts = [prompt.rstrip() for prompt in prompts[start : start + self.batch_size]]
            rows = [[self.begin, *tokens][new_tokens - most :] for tokens in self.tokenizer.encode_batch(texts)]
            longest = max(map(len, rows))
            ids = torch.tensor([[self.end] * (longest - len(row)) + row for row in rows], device=self.model.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=ids.device)
            written = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=self.end,
                stopping_criteria=StoppingCriteriaList([LineEnd(self._decode, longest)]),
                **self.model_arguments,
            )[:, longest:]
            answers += [self._decode(row).partition("\n")[0].strip() for row in written]
        return answers

    def _decode(self, tokens: torch.Tensor) -> str:
        return str(self.tokenizer.hf_tokenizer.decode(tokens, skip_special_tokens=True))


class LineEnd(StoppingCriteria):
    """Stops a row when its first line is complete.

    Args:
        decode: returns the text of a row's tokens.
        prompt_length: columns of the prompts, padding included.
    """

    def __init__(self, decode: Callable[[torch.Tensor], str], prompt_length: int) -> None:
        self.decode, self.prompt_length = decode, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return for each row whether it is complete, (B,) bool."""
        texts = map(self.decode, input_ids[:, self.prompt_length :])
        return torch.tensor(["\n" in text for text in texts], device=input_ids.device)


def normalized(answer: str) -> str:
    """Return an answer in lower case without punctuation, articles and extra spaces.

    One that consists of these alone keeps them.
    """
    plain = ARTICLES.sub(" ", answer.lower().translate(NO_PUNCTUATION))
    return " ".join(plain.split()) or answer.lower().strip()


def exact_match(written: str, answers: Sequence[str]) -> float:
    """Return 1 if what was written is one of the right answers, else 0."""
    return float(normalized(written) in map(normalized, answers))


def f1(written: str, answers: Sequence[str]) -> float:
    """Return the best F1 over the right answers, of the words that both have."""
    return max(_word_f1(normalized(written).split(), normalized(answer).split()) for answer in answers)


def _word_f1(written: list[str], answer: list[str]) -> float:
    common = (Counter(written) & Counter(answer)).total()
    return 2 * common / (len(written) + len(answer)) if common else 0.0
