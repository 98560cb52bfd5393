"""Questions about made-up facts, and how they are asked: with retrieval, without, in context."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer, MilvusRetriever

from .fact_answers import Prompts, ask, first_token
from .fact_base import CHANGED
from .kept import Arrays
from .made_up_facts import Fact
from .opening import plain_decoder

SPARE_TOKENS = 2  # written beyond the longest answer
SEPARATOR = "\n"  # after each neighbor in a prompt


@dataclass(frozen=True)
class Question:
    """A question about a fact.

    Attributes:
        fact: the fact's number.
        wording: "own words" (the document's) or "other words".
        prompt: the answer continues it.
        doc_id: the fact's document.
        candidates: the right answer, then wrong ones.
    """

    fact: int
    wording: str
    prompt: str
    doc_id: str
    candidates: tuple[str, ...]


def questions_of(facts: Sequence[Fact]) -> list[Question]:
    """Return each fact's questions."""
    return [
        Question(number, wording, prompt, fact.doc_id, (fact.answer, *fact.distractors))
        for number, fact in enumerate(facts)
        for wording, prompt in fact.prompts.items()
    ]


def revised_questions(facts: Sequence[Fact], roles: Sequence[str]) -> list[Question]:
    """Return the questions after the changes, in the same order.

    Where the document was changed, the new answer is right, and the old one is a wrong one.
    """
    revised = []
    for question in questions_of(facts):
        fact, candidates = facts[question.fact], question.candidates
        if roles[question.fact] == CHANGED:
            candidates = (fact.changed, fact.answer, *fact.distractors[1:])
        revised.append(Question(question.fact, question.wording, question.prompt, question.doc_id, candidates))
    return revised


class Asker:
    """Asks a model that has a retriever.

    Args:
        model: RETRO in evaluation mode.
        tokenizer: the model's.
        facts: their answers decide how many tokens are written.
        batch_size: questions in a forward pass.
    """

    def __init__(
        self, model: RetroForCausalLM, tokenizer: BulkTokenizer, facts: Sequence[Fact], batch_size: int
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.decoder = plain_decoder(model)
        self.begin = first_token(tokenizer)
        answers = [f" {answer}" for fact in facts for answer in (fact.answer, fact.changed)]
        self.new_tokens = SPARE_TOKENS + max(map(len, tokenizer.encode_continuations(answers)))
        (self.separator,) = tokenizer.encode_continuations([SEPARATOR])

    def answers(self, questions: Sequence[Question], condition: str, k: int = 0) -> Arrays:
        """Ask some questions.

        Args:
            questions: N questions with n candidates each.
            condition: "on", "off" or "in-context".
            k: neighbors in the prompt, for "in-context".

        Returns:
            written (N,) text: what the model wrote; log_likelihoods (N, n) of the candidates. With
            neighbors also found (N,): the fact's document is among them; and shown (N,): the right
            answer is in their text.
        """
        prompts = Prompts.encode(
            self.tokenizer,
            [question.prompt for question in questions],
            [question.candidates for question in questions],
        )
        if condition == "off":
            return self._ask(self.model, prompts, {"use_retrieval": False})
        read = self._neighbors(prompts, k)
        among = {
            "found": [question.doc_id in documents for question, (documents, _) in zip(questions, read, strict=True)],
            "shown": [
                any(question.candidates[0] in self.tokenizer.decode(tokens) for tokens in neighbors)
                for question, (_, neighbors) in zip(questions, read, strict=True)
            ],
        }
        if condition == "on":
            asked = self._ask(self.model, prompts, {})
        else:
            contexts = [neighbors for _, neighbors in read]
            asked = self._ask(self.decoder, self._with_context(prompts, contexts), {})
        return asked | {name: np.array(values) for name, values in among.items()}

    def _neighbors(self, prompts: Prompts, k: int) -> list[tuple[list[str | None], list[list[int]]]]:
        """Return for each prompt the documents and the tokens of its best neighbors; all for k = 0.

        The retriever remembers them: RETRO then reads the same ones.
        """
        retriever = self.model.retriever
        assert isinstance(retriever, MilvusRetriever), "set before anything is asked"
        k = k or retriever.num_neighbors
        found = retriever.retrieve([tokens[-retriever.chunk_size :] for tokens in prompts.tokens])
        texts = [
            [ids[mask].tolist() for ids, mask in zip(*rows, strict=True)]
            for rows in zip(found.ids[:, :k], found.attention_mask[:, :k], strict=True)
        ]
        return list(zip([documents[:k] for documents in found.doc_ids], texts, strict=True))

    def _with_context(self, prompts: Prompts, contexts: Sequence[Sequence[Sequence[int]]]) -> Prompts:
        """Return prompts with the neighbors' text before the question, the best one next to it.

        What does not fit into the decoder's positions is cut off at the beginning.
        """
        positions = self.model.config.n_positions
        longer = []
        for tokens, neighbors, candidates in zip(prompts.tokens, contexts, prompts.candidates, strict=True):
            before = [token for its in reversed(neighbors) if its for token in (*its, *self.separator)]
            written = max(self.new_tokens, *map(len, candidates))
            room = max(positions - len(tokens) - written, 0)
            longer.append([self.begin, *before[max(len(before) - room, 0) :], *tokens[1:]])
        return Prompts(longer, prompts.candidates)

    def _ask(self, model: PreTrainedModel, prompts: Prompts, arguments: Mapping[str, Any]) -> Arrays:
        """Ask in batches of prompts of similar length."""
        order = sorted(range(len(prompts.tokens)), key=lambda row: len(prompts.tokens[row]))
        written, scores = [""] * len(order), [np.empty(0)] * len(order)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = Prompts([prompts.tokens[row] for row in rows], [prompts.candidates[row] for row in rows])
            tokens, log_likelihoods = ask(model, batch, self.new_tokens, self.begin, arguments)
            for place, row in enumerate(rows):
                written[row] = self.tokenizer.decode_text(tokens[place])
                scores[row] = log_likelihoods[place]
        return {"written": np.array(written), "log_likelihoods": np.stack(scores)}
