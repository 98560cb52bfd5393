"""Made-up facts, which no model can know unless it reads them.

Names are built from syllables, and numbers are drawn. Each fact has a document of its own, a
question in the document's words and one in other words, the right answer, and wrong answers of the
same kind. Equal seeds give equal facts.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from retrieval import Document

from .fact_kinds import KINDS, REMARKS, Draw, Kind

DISTRACTORS = 9  # wrong answers beside each right one
MOST_DRAWS = 1000  # of a name that is not taken
SOURCE = "facts"  # of the documents, in their metadata
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Fact:
    """A made-up fact.

    Attributes:
        doc_id: id of its document.
        kind: one of `KINDS`.
        subject: what it is about.
        answer: the right answer.
        changed: the right answer after the document was changed.
        before: the document's text before the statement; empty, or ending with a space.
        statement: the sentence up to the answer.
        after: the document's text after the answer.
        question: the question in other words.
        reply: the beginning of a sentence that answers it, up to the answer.
        distractors: wrong answers, which are other facts' right ones.
    """

    doc_id: str
    kind: str
    subject: str
    answer: str
    changed: str
    before: str
    statement: str
    after: str
    question: str
    reply: str
    distractors: tuple[str, ...] = ()

    def document(self, answer: str | None = None) -> Document:
        """Return the document, with another answer if one is given."""
        text = f"{self.before}{self.statement} {answer or self.answer}{self.after}"
        return Document(self.doc_id, text, {"source": SOURCE})

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts that the answer continues, by the name of their wording."""
        return {"own words": self.statement, "other words": f"Question: {self.question}\nAnswer: {self.reply}"}

    @property
    def words(self) -> set[str]:
        """The invented words and numbers, in lower case."""
        capitalized = [word for word in WORD.findall(self.subject) if word[0].isupper()]
        return {word.lower() for word in (*capitalized, *WORD.findall(f"{self.answer} {self.changed}"))}


def make_up_facts(count: int, seed: int, taken: Collection[str] = ()) -> list[Fact]:
    """Return made-up facts, as many of each kind as of any other.

    Args:
        count: the number of facts, at least enough for the distractors of each kind.
        seed: another seed gives other facts.
        taken: words in lower case that no name and no answer may contain.

    Raises:
        ValueError: there are too few facts for the distractors.
    """
    least = len(KINDS) * (DISTRACTORS + 1)
    if count < least:
        raise ValueError(
            f"{count} facts are too few: each of {len(KINDS)} kinds needs {DISTRACTORS} wrong answers beside a right "
            f"one. Make up at least {least}."
        )
    draw, used = Random(seed), set(taken)
    names = list(KINDS)
    facts = [_make_up(number, seed, names[number % len(names)], draw, used) for number in range(count)]
    by_kind = {name: [fact for fact in facts if fact.kind == name] for name in names}
    return [replace(fact, distractors=_distractors(fact, by_kind[fact.kind], draw)) for fact in facts]


def words_of(texts: Iterable[str]) -> set[str]:
    """Return all words of texts in lower case, to be [`make_up_facts`]'s `taken`."""
    return {word for text in texts for word in WORD.findall(text.lower())}


def words_of_facts(facts: Iterable[Fact]) -> set[str]:
    """Return all invented words and numbers of facts, in lower case."""
    return set().union(*(fact.words for fact in facts))


def write_training(folder: Path, facts: Iterable[Fact]) -> None:
    """Write facts to train on.

    documents.jsonl has the documents, to be ingested: "id" and "text". questions.jsonl has each
    question with its answer as one text, with "id", "prompt" and "answer" beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents, questions = [], []
    for fact in facts:
        document = fact.document()
        documents.append({"id": document.id, "text": document.text})
        for wording, prompt in fact.prompts.items():
            row = {"id": f"questions/{document.id}/{wording}", "text": f"{prompt} {fact.answer}"}
            questions.append(row | {"prompt": prompt, "answer": fact.answer})
    for name, rows in (("documents", documents), ("questions", questions)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _make_up(number: int, seed: int, name: str, draw: Random, used: set[str]) -> Fact:
    kind: Kind = KINDS[name]
    subject, answer, changed = (_fresh(part, draw, used) for part in (kind.subject, kind.answer, kind.answer))

    def fill(choices: Sequence[str]) -> str:
        return _capitalized(draw.choice(choices).format(s=subject, n=draw.randint(12, 980)))

    lead, statement, rest, remark = (fill(part) for part in (kind.leads, kind.statements, kind.rests, REMARKS))
    question, reply = (_capitalized(part.format(s=subject)) for part in draw.choice(kind.questions))
    return Fact(
        doc_id=f"{SOURCE}/{seed}/{number}",
        kind=name,
        subject=subject,
        answer=answer,
        changed=changed,
        before=lead and f"{lead} ",
        statement=statement,
        after=rest + (remark and f" {remark}"),
        question=question,
        reply=reply,
    )


def _capitalized(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _fresh(part: Draw, draw: Random, used: set[str]) -> str:
    """Draw a name of which no invented word is used, and use it.

    Raises:
        ValueError: there is none left.
    """
    for _ in range(MOST_DRAWS):
        drawn = part(draw)
        words = {word.lower() for word in WORD.findall(drawn) if not word.islower()}
        if used.isdisjoint(words):
            used |= words
            return drawn
    raise ValueError(f"No name or number is left after {len(used)} words. Make up fewer facts.")


def _distractors(fact: Fact, same_kind: Sequence[Fact], draw: Random) -> tuple[str, ...]:
    others = [other.answer for other in same_kind if other is not fact]
    return tuple(draw.sample(others, DISTRACTORS))
