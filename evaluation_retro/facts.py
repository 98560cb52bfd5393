"""Ask a model for made-up facts that only the knowledge base knows, and change them while it runs.

The facts' documents stand among real text in a knowledge base that is built for this. Each fact is
asked once in its document's words and once in others:

    on              RETRO, with a retrieval point at the end of the question
    off             the decoder alone
    in-context, k   the decoder alone, with the text of the same k neighbors before the question

Then half of the documents are changed and a quarter is deleted, while the knowledge base is open,
and RETRO is asked again.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrieval import Document
from retrieval.settings import same_setting

from .fact_base import REVISED, TOLD, FactBase, enough_text, roles_of
from .fact_questions import Asker, Question, questions_of, revised_questions
from .fact_report import Asked, write_report
from .kept import Arrays, Kept
from .made_up_facts import Fact, make_up_facts, words_of, words_of_facts, write_training
from .opening import ModelSettings, Opened, open_model
from .windows import TextSettings, read_texts

QUESTIONS_KEPT = 64  # in one file: a break loses at most so many


@dataclass
class FactsSettings(ModelSettings):
    """The settings of `retro-eval facts`.

    Raises:
        ValueError: there are no texts, a knowledge base is named, or a number is out of its range.
    """

    texts: list[str] = field(
        default_factory=list,
        metadata={"help": "Real text that the facts stand among: files, folders, or names of datasets."},
    )
    text_field: str = same_setting(TextSettings, "text_field")
    doc_id_field: str | None = same_setting(TextSettings, "doc_id_field")
    chunks: int = field(default=20_000, metadata={"help": "Chunks of real text, at least."})
    facts: int = field(default=1000, metadata={"help": "Made-up facts."})
    asked: int | None = field(
        default=None,
        metadata={"help": "Ask for the first of the facts only, to save time. By default all are asked."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the facts, and of which documents are changed."})
    in_context: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of neighbors in the decoder's prompt, for in-context retrieval. By default the model's "
            "number and 1. 0: leave it out."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Questions in a forward pass."})
    output_dir: str = field(
        default="facts", metadata={"help": "Folder for the report, the knowledge base and all finished parts."}
    )
    write_training: str | None = field(
        default=None,
        metadata={
            "help": "Folder to write facts of another seed to, as documents and questions to train on. None of their "
            "names and answers is asked here. Nothing is measured then."
        },
    )
    training_seed: int = field(default=1, metadata={"help": "Seed of the facts to train on."})

    def __post_init__(self) -> None:
        if self.knowledge_base is not None or self.collection_name is not None:
            raise ValueError(
                "facts builds a knowledge base of its own in output_dir, since it changes and deletes documents. Leave "
                "out knowledge_base and collection_name."
            )
        for name in ("chunks", "facts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Give at least 1.")
        if self.asked is not None and not 1 <= self.asked <= self.facts:
            raise ValueError(f"asked is {self.asked}. Give a number from 1 to facts ({self.facts}).")
        if self.training_seed == self.seed:
            raise ValueError(f"training_seed is {self.seed}, as seed is. Give another one: facts to train on are new.")


def run(settings: FactsSettings) -> None:
    """Build the knowledge base, ask, change the documents, ask again, and write the report.

    Raises:
        ValueError: the model has no weights that read neighbors; there is too little text; there
            are too few facts; more neighbors are asked for in context than the model reads; or the
            folder holds another measurement.
        KnowledgeBaseError: the knowledge base cannot be built.
        OSError: there is no such model or text.
    """
    opened = open_model(settings, builds_its_own=True)
    in_context = _numbers_in_context(settings, opened)
    documents = read_texts(settings.texts, settings.text_field, settings.doc_id_field)
    texts = enough_text(documents, opened.tokenizer, opened.model.config.chunk_size, settings.chunks)
    taken = words_of(document.text for document in texts)
    facts = make_up_facts(settings.facts, settings.seed, taken)
    if settings.write_training is not None:
        new = make_up_facts(settings.facts, settings.training_seed, taken | words_of_facts(facts))
        write_training(Path(settings.write_training), new)
        print(f"Wrote {len(new)} facts to {settings.write_training}: documents.jsonl and questions.jsonl.")
        return
    folder = Path(settings.output_dir)
    kept = Kept(folder / "answers", _described(settings, opened, texts, facts))
    kept.claim()  # the knowledge base that is built next to the answers belongs to them
    roles = roles_of(len(facts), settings.seed)
    base = FactBase(settings, folder, opened.tokenizer, opened.model.config, texts, facts, roles)
    try:
        opened.model.set_retriever(base.retriever)
        asker = Asker(opened.model, opened.tokenizer, facts, settings.batch_size)
        asked = _ask_all(asker, base, kept, in_context, settings.asked)
        write_report(folder, settings.name, base, asked)
    finally:
        base.close()


def _numbers_in_context(settings: FactsSettings, opened: Opened) -> list[int]:
    """Return the numbers of neighbors that stand in the decoder's prompt, the largest first.

    Raises:
        ValueError: one of them is more than the model reads.
    """
    most = opened.model.config.num_neighbors
    assert most is not None, "set when a configuration is made"
    numbers = [most, 1] if settings.in_context is None else settings.in_context
    if not all(0 <= number <= most for number in numbers):
        raise ValueError(f"in_context is {numbers}, but the model reads {most} neighbors. Give numbers up to {most}.")
    return sorted({*numbers} - {0}, reverse=True)


def _described(
    settings: FactsSettings, opened: Opened, texts: Sequence[Document], facts: Sequence[Fact]
) -> Mapping[str, Any]:
    """Return what the kept answers belong to."""
    names = (
        *("texts", "seed", "asked", "search", "embedding_model"),
        *("query_prompt", "document_prompt", "truncate_dim", "reranker", "rerank_candidates"),
    )
    digest = hashlib.sha256("".join([*(document.text for document in texts), *map(repr, facts)]).encode())
    return opened.describe() | {
        "model": settings.name,
        **{name: getattr(settings, name) for name in names},
        "facts and texts": digest.hexdigest()[:16],
    }


def _ask_all(asker: Asker, base: FactBase, kept: Kept, in_context: Sequence[int], most: int | None) -> Asked:
    """Ask all questions before the changes and after. Finished parts are read from the folder."""
    facts, roles = base.facts[:most], base.roles[:most]
    before, after = questions_of(facts), revised_questions(facts, roles)

    def parts(name: str, questions: Sequence[Question], state: str, condition: str, k: int = 0) -> Arrays:
        def compute(rows: range) -> Arrays:
            base.be(state)
            return asker.answers([questions[row] for row in rows], condition, k)

        return kept.parts(name, len(questions), QUESTIONS_KEPT, compute)

    conditions = {
        "on": parts("on", before, TOLD, "on"),
        "off": parts("off", before, TOLD, "off"),
        **{f"in-context, k = {k}": parts(f"in_context_{k}", before, TOLD, "in-context", k) for k in in_context},
    }
    return Asked(before, conditions, after, parts("revised_on", after, REVISED, "on"))


SETTINGS = FactsSettings
