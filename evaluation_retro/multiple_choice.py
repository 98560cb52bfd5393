"""Answer multiple-choice prompts by likelihood."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from retrieval import BulkTokenizer

from .continuations import Continuation, score_continuations

SCORINGS = ("likelihood", "one_token")
# The last question's answers are lines such as "B. text" or "2. text" before "Answer:" or "A:".
OPTION = re.compile(r"^\(?([A-Za-z]|\d+)[.)] ?(.*)$")
FIRST_OPTIONS = ("A", "a", "1")
MOST_LINES_AFTER = 2  # lines such as "Answer:" that may follow the answers


class LikelihoodChoice:
    """Choose the answer that is the most likely one by its mean log-likelihood per byte.

    Args:
        model: a RETRO model, also with adapters.
        scoring: "likelihood" compares the texts of the answers, "one_token" their letters.
        batch_size: sequences in a forward pass.
        model_arguments: passed to every forward pass, such as {"use_retrieval": False}.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: BulkTokenizer,
        scoring: str,
        batch_size: int,
        model_arguments: Mapping[str, Any],
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-text token to begin a question with. Set its eos_token.")
        self.model, self.tokenizer, self.end = model, tokenizer, tokenizer.eos_token_id
        self.begin = self.end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.scoring, self.batch_size, self.model_arguments = scoring, batch_size, model_arguments

    def choose(self, prompts: Sequence[str], schemas: Sequence[Any]) -> list[Any]:
        """Answer each prompt.

        Args:
            schemas: for each prompt, a pydantic model with one field, `answer`.

        Returns:
            An instance of each schema, with the most likely answer.

        Raises:
            ValueError: a prompt lists no answers.
        """
        pairs: list[tuple[str, str]] = []
        choices: list[tuple[list[str], slice]] = []
        for prompt, schema in zip(prompts, schemas, strict=True):
            question, options = split_question(prompt)
            labels = [str(label) for label in get_args(schema.model_fields["answer"].annotation)] or list(options)
            if self.scoring == "likelihood" and options:
                labels = [label for label in labels if label in options]
                texts = [(question, f" {options[label]}") for label in labels]
            else:
                texts = [(prompt.rstrip(), f" {label}") for label in labels]
            if not texts:
                raise ValueError(f"The question {prompt[-80:]!r} lists no answers to choose from. Leave its task out.")
            choices.append((labels, slice(len(pairs), len(pairs) + len(texts))))
            pairs += texts
        scores = self.log_likelihoods(pairs)
        answers = []
        for schema, (labels, place) in zip(schemas, choices, strict=True):
            lengths = [len(text.encode()) for _, text in pairs[place]]
            best = int(np.argmax([score / length for score, length in zip(scores[place], lengths, strict=True)]))
            annotation = schema.model_fields["answer"].annotation
            answers.append(schema(answer=int(labels[best]) if annotation is int else labels[best]))
        return answers

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return Σ log p(continuation | context) for pairs of context and continuation.

        A context that is too long for the model loses its beginning. The end of the context is a
        retrieval point, whatever its length: a short question is searched for, too.
        """
        tokenizer, most = self.tokenizer, self.model.config.n_positions
        rows = []
        for context, continuation in pairs:
            (tokens,), (answer,) = tokenizer.encode_batch([context]), tokenizer.encode_continuations([continuation])
            rows.append(Continuation([self.begin, *tokens, *answer][-most:], min(len(answer), most - 1)))
        scores: list[tuple[float, bool]] = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            scores += score_continuations(self.model, batch, self.end, self.model_arguments)
        return [score for score, _ in scores]


def split_question(prompt: str) -> tuple[str, dict[str, str]]:
    """Split a prompt into the text before its answers and the answers by letter or number.

    A prompt without such answers is returned whole, with an empty dictionary.
    """
    lines = prompt.rstrip().split("\n")
    end = len(lines)
    while end and not OPTION.match(lines[end - 1]):
        end -= 1
    options: list[tuple[str, str]] = []
    place = end
    while place and (match := OPTION.match(lines[place - 1])):
        place -= 1
        options.insert(0, (match.group(1), match.group(2)))
        if match.group(1) in FIRST_OPTIONS:
            break
    if not options or options[0][0] not in FIRST_OPTIONS or len(lines) - end > MOST_LINES_AFTER:
        return prompt, {}
    return "\n".join(lines[:place]), dict(options)
