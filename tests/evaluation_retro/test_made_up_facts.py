"""Made-up facts: what they consist of, and that nothing else knows their names."""

import json
import pydoc_data.topics
import re
from collections import Counter

import pytest

from evaluation_retro.fact_kinds import KINDS
from evaluation_retro.made_up_facts import (
    DISTRACTORS,
    make_up_facts,
    words_of,
    words_of_facts,
    write_training,
)

FACTS = make_up_facts(300, seed=0)
REAL = "\n".join(pydoc_data.topics.topics.values())


def test_the_same_seed_gives_the_same_facts():
    assert make_up_facts(300, seed=0) == FACTS
    assert make_up_facts(300, seed=1) != FACTS


def test_each_document_has_its_answer_once_and_no_other_document_has_it():
    texts = [fact.document().text for fact in FACTS]
    for place, fact in enumerate(FACTS):
        assert [number for number, text in enumerate(texts) if re.search(rf"\b{fact.answer}\b", text)] == [place]
        assert texts[place].count(fact.answer) == 1
        assert not any(re.search(rf"\b{fact.changed}\b", text) for text in texts)


def test_a_changed_document_differs_in_its_answer_alone():
    for fact in FACTS:
        old, new = fact.document(), fact.document(fact.changed)
        assert new.id == old.id
        assert new.text == old.text.replace(fact.answer, fact.changed) != old.text


def test_no_name_occurs_in_real_text():
    names = words_of_facts(make_up_facts(300, 0, taken=words_of([REAL])))
    assert names.isdisjoint(re.findall(r"\w+", REAL.lower()))


def test_facts_to_train_on_share_no_name_and_no_answer():
    new = make_up_facts(300, seed=1, taken=words_of_facts(FACTS))
    asked = " ".join(f"{fact.document().text} {fact.changed}" for fact in FACTS).lower()
    assert not words_of_facts(new) & set(re.findall(r"\w+", asked))


def test_questions_are_in_the_documents_words_and_in_others():
    for fact in FACTS:
        text = fact.document().text
        assert f"{fact.prompts['own words']} {fact.answer}" in text
        other = fact.prompts["other words"]
        assert other not in text and fact.reply not in text
        assert fact.answer not in other and fact.subject.lower() in other.lower()


def test_wrong_answers_are_right_for_other_facts_of_the_same_kind():
    for fact in FACTS:
        answers = {other.answer for other in FACTS if other.kind == fact.kind and other != fact}
        assert len(set(fact.distractors)) == DISTRACTORS and answers.issuperset(fact.distractors)
        assert not {fact.answer, fact.changed} & set(fact.distractors)


def test_documents_are_of_many_forms():
    forms = Counter()
    for fact in FACTS:
        form = fact.document().text.replace(fact.subject, "S").replace(fact.answer, "A")
        forms[re.sub(r"\d+", "N", form)] += 1
    assert {fact.kind for fact in FACTS} == set(KINDS)
    assert len(forms) > 200 and forms.most_common(1)[0][1] < 6


def test_too_few_facts_have_no_wrong_answers():
    with pytest.raises(ValueError, match="99 facts are too few.*at least 100"):
        make_up_facts(99, seed=0)


def test_training_files_hold_documents_and_questions(tmp_path):
    write_training(tmp_path / "new", FACTS[:3])
    documents, questions = (
        [json.loads(line) for line in (tmp_path / "new" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("documents", "questions")
    )
    assert [row["text"] for row in documents] == [fact.document().text for fact in FACTS[:3]]
    assert len(questions) == 6 and len({row["id"] for row in documents + questions}) == 9
    assert all(row["text"] == f"{row['prompt']} {row['answer']}" for row in questions)
