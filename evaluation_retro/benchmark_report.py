"""Report benchmarks: each task's scores with and without neighbors, with 95 % intervals."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .benchmarks import Answered
from .report import Report
from .statistics import Score

Measured = dict[str, dict[str, Answered]]  # by task and condition
TOTAL = "all tasks"
COLORS = {"off": "#8c8c8c", "on": "#4c72b0"}
BAR_WIDTH = 0.4


def scores_of(tasks: Sequence[dict[str, Answered]]) -> dict[str, dict[str, Score]]:
    """Return scores of the questions of some tasks, by measure and condition.

    "gain" is the difference of "on" and "off", if there are both.
    """
    scores: dict[str, dict[str, Score]] = {}
    for measure in next(iter(tasks[0].values())).scores:
        values = {
            condition: [value for task in tasks for value in task[condition].scores[measure]] for condition in tasks[0]
        }
        scores[measure] = {condition: Score.of(numbers) for condition, numbers in values.items()}
        if "on" in values:
            scores[measure]["gain"] = Score.difference(values["on"], values["off"])
    return scores


def write_report(folder: Path, model_name: str, measured: dict[str, Measured]) -> None:
    """Write the report, and all answers to benchmarks_answers.jsonl.

    Args:
        folder: for the files.
        model_name: for the title.
        measured: what was answered to each benchmark.
    """
    report = Report(folder, "benchmarks", f"Benchmarks of {model_name}")
    report.text(
        "On: a knowledge base is searched at the end of each question. Off: the decoder alone. Scores are shares of "
        "1, with 95 % intervals over questions; the difference is paired."
    )
    totals = {}
    for name, tasks in measured.items():
        scores = {task: scores_of([conditions]) for task, conditions in tasks.items()}
        if len(tasks) > 1:
            scores[TOTAL] = scores_of([*tasks.values()])
        totals[name] = scores_of([*tasks.values()])
        has_gain = "gain" in next(iter(totals[name].values()))
        rows = [
            [task, measure, str(its["off"].questions), f"{its['off']:.3f}"]
            + ([f"{its['on']:.3f}", f"{its['gain']:+.3f}"] if has_gain else [])
            for task, measures in scores.items()
            for measure, its in measures.items()
        ]
        columns = ["task", "score", "questions", "off", *(["on", "on − off"] if has_gain else [])]
        report.table(columns, rows, title=name)
        report.numbers({name: scores})
    report.plot("scores", lambda axes: draw_bars(axes, totals))
    _write_answers(folder / "benchmarks_answers.jsonl", measured)
    report.save()


def _write_answers(file: Path, measured: dict[str, Measured]) -> None:
    """Write a line of JSON for each question and condition."""
    with file.open("w", encoding="utf-8") as lines:
        for name, tasks in measured.items():
            for task, conditions in tasks.items():
                for condition, its in conditions.items():
                    for number, question in enumerate(its.questions):
                        line: dict[str, Any] = {
                            "benchmark": name,
                            "task": task,
                            "condition": condition,
                            "question": question,
                        }
                        line |= {"prediction": its.predictions[number], "answers": its.answers[number]}
                        line |= {measure: values[number] for measure, values in its.scores.items()}
                        lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def draw_bars(axes: Any, totals: dict[str, dict[str, dict[str, Score]]]) -> None:
    """Draw each benchmark's first score under both conditions, with intervals."""
    firsts = [next(iter(measures.values())) for measures in totals.values()]
    for place, condition in enumerate(condition for condition in COLORS if condition in firsts[0]):
        its = [scores[condition] for scores in firsts]
        middles = np.arange(len(its)) + (place - 0.5) * BAR_WIDTH
        values = [score.value for score in its]
        axes.bar(middles, values, BAR_WIDTH, color=COLORS[condition], label=condition)
        axes.vlines(middles, [score.low for score in its], [score.high for score in its], color="black")
    axes.set_xticks(range(len(totals)), list(totals))
    axes.set_ylabel("accuracy, or share of exact matches")
    axes.legend()
