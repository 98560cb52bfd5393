"""The report of `retro-eval facts`: tables, a plot, and every answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .fact_answers import is_exact_match, ranks
from .fact_base import CHANGED, DELETED, UNTOUCHED, FactBase
from .fact_questions import Question
from .kept import Arrays
from .report import Report
from .statistics import Score

WORDINGS = ("own words", "other words")


@dataclass
class Asked:
    """All questions with their answers.

    Attributes:
        before: N questions, before the changes.
        conditions: name -> their answers, as [`Asker.answers`] returns them.
        after: the same N questions after the changes.
        revised: their answers with retrieval.
    """

    before: Sequence[Question]
    conditions: dict[str, Arrays]
    after: Sequence[Question]
    revised: Arrays


def measures(questions: Sequence[Question], answers: Arrays) -> dict[str, Score]:
    """Return what is measured of some questions under one condition.

    Args:
        questions: N questions.
        answers: theirs, as [`Asker.answers`] returns them.
    """
    right = [is_exact_match(str(written), its.candidates[0]) for written, its in _pairs(questions, answers)]
    rank = ranks(answers["log_likelihoods"])
    means = {"exact_match": Score.of(right), "first": Score.of(rank == 1), "mrr": Score.of(1 / rank)}
    return means | {name: Score.of(answers[name]) for name in ("found", "shown") if name in answers}


def change_measures(asked: Asked, roles: Sequence[str], wording: str) -> dict[str, Score]:
    """Return how the answers of one wording follow the changes, with retrieval."""
    rows = {
        role: [row for row, its in enumerate(asked.after) if roles[its.fact] == role and its.wording == wording]
        for role in (CHANGED, DELETED, UNTOUCHED)
    }
    told = asked.conditions["on"]

    def matches(answers: Arrays, role: str, questions: Sequence[Question]) -> Score:
        return Score.of([is_exact_match(str(answers["written"][i]), questions[i].candidates[0]) for i in rows[role]])

    rank = ranks(asked.revised["log_likelihoods"])
    same = told["written"] == asked.revised["written"]
    return {
        "changed: old answer before": matches(told, CHANGED, asked.before),
        "changed: new answer after": matches(asked.revised, CHANGED, asked.after),
        "changed: old answer after": matches(asked.revised, CHANGED, asked.before),
        "changed: new answer ranked first": Score.of(rank[rows[CHANGED]] == 1),
        "changed: document found after": Score.of(asked.revised["found"][rows[CHANGED]]),
        "deleted: old answer before": matches(told, DELETED, asked.before),
        "deleted: old answer after": matches(asked.revised, DELETED, asked.before),
        "deleted: document found after": Score.of(asked.revised["found"][rows[DELETED]]),
        "untouched: right before": matches(told, UNTOUCHED, asked.before),
        "untouched: right after": matches(asked.revised, UNTOUCHED, asked.after),
        "untouched: the same words written": Score.of(same[rows[UNTOUCHED]]),
    }


def write_report(folder: Path, model: str, base: FactBase, asked: Asked) -> None:
    """Write facts.json, facts.md, the plots and answers.jsonl, and print the tables."""
    report = Report(folder, "facts", "Made-up facts")
    k = base.retriever.num_neighbors
    report.text(
        f"{model}. {len(base.facts):,} made-up facts, each in a document of its own, among {base.chunks:,} chunks; "
        f"{base.retriever.search} search, {k} neighbors. Means over questions with 95 % intervals."
    )
    shares = {
        wording: {name: measures(*_worded(asked, wording, answers)) for name, answers in asked.conditions.items()}
        for wording in WORDINGS
    }
    changes = {wording: change_measures(asked, base.roles, wording) for wording in WORDINGS}
    _before_table(report, shares)
    report.plot("answers", lambda axes: _draw(axes, {w: _exact(shares[w]) for w in WORDINGS}, "exact match"))
    _change_table(report, changes)
    report.plot("changes", lambda axes: _draw(axes, changes, "share of questions"))
    report.text("All questions with all answers: answers.jsonl.")
    numbers: dict[str, Any] = {
        "model": model,
        "facts": len(base.facts),
        "chunks": base.chunks,
        "search": base.retriever.search,
        "embedding_model": base.retriever.embedding_model,
        "neighbors": k,
        "before": shares,
        "after": changes,
    }
    report.numbers(numbers)
    _write_answers(folder / "answers.jsonl", asked, base.roles)
    report.save()


def _pairs(questions: Sequence[Question], answers: Arrays) -> zip:
    return zip(answers["written"], questions, strict=True)


def _worded(asked: Asked, wording: str, answers: Arrays) -> tuple[list[Question], Arrays]:
    """Return the questions of one wording with their answers."""
    rows = [row for row, question in enumerate(asked.before) if question.wording == wording]
    return [asked.before[row] for row in rows], {name: values[rows] for name, values in answers.items()}


def _exact(conditions: dict[str, dict[str, Score]]) -> dict[str, Score]:
    return {name: shares["exact_match"] for name, shares in conditions.items()}


def _before_table(report: Report, shares: dict[str, dict[str, dict[str, Score]]]) -> None:
    columns = ["asked in", "", "exact match", "right one ranked first", "mean reciprocal rank", "document found"]
    rows = [
        [wording, name, *(str(its.get(key, "")) for key in ("exact_match", "first", "mrr", "found"))]
        for wording in WORDINGS
        for name, its in shares[wording].items()
    ]
    report.table(columns, rows, "Before the changes: 10 candidates, so guessing ranks 0.100 first")


def _change_table(report: Report, changes: dict[str, dict[str, Score]]) -> None:
    rows = [[name, *(str(changes[wording][name]) for wording in WORDINGS)] for name in changes[WORDINGS[0]]]
    report.table(["", *WORDINGS], rows, "Half of the documents changed, a quarter deleted, with retrieval")


def _write_answers(file: Path, asked: Asked, roles: Sequence[str]) -> None:
    """Write every question with all that was written, one JSON object a line."""
    lines = []
    for place, (before, after) in enumerate(zip(asked.before, asked.after, strict=True)):
        its = {
            "document": before.doc_id,
            "wording": before.wording,
            "prompt": before.prompt,
            "answer": before.candidates[0],
            "became": roles[before.fact],
            "answer_after": after.candidates[0],
            "found": bool(asked.conditions["on"]["found"][place]),
            "written": {name: str(answers["written"][place]) for name, answers in asked.conditions.items()},
            "rank": {
                name: int(ranks(answers["log_likelihoods"][place : place + 1])[0])
                for name, answers in asked.conditions.items()
            },
            "written_after": str(asked.revised["written"][place]),
        }
        lines.append(json.dumps(its, ensure_ascii=False))
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _draw(axes: Any, shares: dict[str, dict[str, Score]], label: str) -> None:
    """Draw horizontal bars with intervals: one group for each name, one bar for each wording."""
    names = list(shares[WORDINGS[0]])
    height = 0.8 / len(WORDINGS)
    for number, wording in enumerate(WORDINGS):
        its = [shares[wording][name] for name in names]
        places = np.arange(len(names)) + number * height
        values = np.array([share.value for share in its])
        errors = np.array([[share.value - share.low, share.high - share.value] for share in its]).T.clip(min=0)
        axes.barh(places, values, height, xerr=errors, label=wording)
    axes.set_yticks(np.arange(len(names)) + height / 2, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(label)
    axes.legend()
