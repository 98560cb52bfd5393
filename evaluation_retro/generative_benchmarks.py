"""Benchmarks whose answers a model writes: DeepEval's LAMBADA, SQuAD and DROP, and TriviaQA.

Data, tasks and few-shot prompts are DeepEval's, with three differences that base models need:

- No instructions follow the question (LAMBADA): a base model would continue them.
- DROP's examples have their answers, which DeepEval leaves out.
- Answers are scored by exact match and F1 over all right answers. DeepEval's SQuAD asks a judge
  model instead, and knows only the first right answer.

DeepEval has no TriviaQA. Here it is closed-book (Joshi et al., 2017): the question alone, after
examples from the training split. Any alias of the answer is right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

SQUAD, TRIVIA_QA = "rajpurkar/squad", "mandarjoshi/trivia_qa"  # on the hub
CLOSED_BOOK = "rc.nocontext"  # TriviaQA's configuration without documents


@dataclass
class Question:
    """A question, its prompt, and all answers that are right."""

    text: str
    prompt: str
    answers: list[str]


@dataclass
class TriviaQA:
    """TriviaQA without documents.

    Attributes:
        n_shots: questions with answers before each question.
        n_problems: questions at most. Default: all.

    Raises:
        ValueError: a number is out of its range.
    """

    n_shots: int = 5
    n_problems: int | None = None
    tasks: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if self.n_shots < 0 or (self.n_problems is not None and self.n_problems < 1):
            raise ValueError(f"n_shots is {self.n_shots} and n_problems {self.n_problems}. Give at least 0 and 1.")


def _lambada(benchmark: Any, task: None) -> list[Question]:
    from deepeval.benchmarks.lambada.template import LAMBADATemplate

    return [
        Question(
            golden.input, LAMBADATemplate.generate_output(golden.input, benchmark.n_shots), [golden.expected_output]
        )
        for golden in benchmark.load_benchmark_dataset()[: benchmark.n_problems]
    ]


def _squad(benchmark: Any, task: Any) -> list[Question]:
    from deepeval.benchmarks.squad.template import SQuADTemplate

    if benchmark.dataset is None:
        benchmark.dataset = datasets.load_dataset(SQUAD)
    questions = []
    for row in benchmark.dataset["validation"].filter(lambda row: row["title"] == task.value):
        text = SQuADTemplate.format_question(row, include_answer=False)
        prompt = SQuADTemplate.generate_output(text, benchmark.n_shots)
        questions.append(Question(text, prompt, row["answers"]["text"]))
    return questions[: benchmark.n_problems_per_task]


def _drop(benchmark: Any, task: Any) -> list[Question]:
    from deepeval.benchmarks.drop.drop import DELIMITER
    from deepeval.benchmarks.drop.template import DROPTemplate

    goldens = benchmark.load_benchmark_dataset(task)[: benchmark.n_problems_per_task]
    examples = [
        DROPTemplate.format_question(row, include_answer=True) + "\n"
        for row in benchmark.shots_dataset[: benchmark.n_shots]
    ]
    start = DROPTemplate.generate_output("", [], 0) + ("Below are some examples:\n\n" if examples else "")
    return [
        Question(
            golden.input,
            start + "".join(examples) + golden.input,
            DROPTemplate.parse_str_to_list(golden.expected_output, DELIMITER),
        )
        for golden in goldens
    ]


def _trivia_qa(benchmark: TriviaQA, task: None) -> list[Question]:
    def split(name: str, most: int | None) -> list[Question]:
        rows = datasets.load_dataset(TRIVIA_QA, CLOSED_BOOK, split=name)
        rows = rows.select(range(len(rows) if most is None else min(most, len(rows))))
        return [
            Question(
                text := f"Question: {row['question']}\nAnswer:",
                text,
                [row["answer"]["value"], *row["answer"]["aliases"]],
            )
            for row in rows
        ]

    shots = split("train", benchmark.n_shots) if benchmark.n_shots else []
    start = "".join(f"{shot.text} {shot.answers[0]}\n\n" for shot in shots)
    questions = split("validation", benchmark.n_problems)
    return [Question(question.text, start + question.text, question.answers) for question in questions]


GENERATIVE: dict[str, Callable[[Any, Any], list[Question]]] = {
    "LAMBADA": _lambada,
    "SQuAD": _squad,
    "DROP": _drop,
    "TriviaQA": _trivia_qa,
}


def read_questions(name: str, benchmark: Any, task: Any) -> list[Question]:
    """Return the questions of a task of a generative benchmark.

    Args:
        name: one of GENERATIVE.
        benchmark: DeepEval's object, or [`TriviaQA`].
        task: one of `benchmark.tasks`, or None for a benchmark without tasks.

    Raises:
        ValueError: the data are not those of this benchmark.
        OSError: there are no data.
    """
    try:
        return GENERATIVE[name](benchmark, task)
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"Benchmark {name}: its data lack what it reads ({type(error).__name__}: {error}). Copy them again, with "
            "the columns that they have on the hub."
        ) from error
