"""Run DeepEval's benchmarks and TriviaQA, with neighbors and without: a score for each task.

Each task's answers are kept in `output_dir`. A run that was broken off goes on from there.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.parsing import as_mapping
from retrieval.settings import same_setting

from .benchmark_report import Measured, write_report
from .benchmarks import Answered, Answerer, BenchmarkSettings, conditions_of, open_benchmarks
from .generative_benchmarks import GENERATIVE, read_questions
from .kept import Arrays, Kept
from .opening import ModelSettings, Opened, open_model

BATCHES_KEPT = 8  # of written answers, in one file: a break loses at most so many
WHOLE = "all"  # the name of the only task of a benchmark without tasks
NOT_IN_NAMES = re.compile(r"\W+")


@dataclass
class BenchmarkCommandSettings(ModelSettings):
    """The settings of `retro-eval benchmarks`."""

    benchmarks: list[str] = same_setting(BenchmarkSettings, "names", default_factory=list)
    benchmark_options: dict[str, Any] | str | None = same_setting(BenchmarkSettings, "options")
    benchmark_data: str | None = same_setting(BenchmarkSettings, "data")
    benchmark_scoring: str = same_setting(BenchmarkSettings, "scoring")
    batch_size: int = same_setting(BenchmarkSettings, "batch_size")
    output_dir: str = field(default="benchmarks", metadata={"help": "Folder of the report and of finished parts."})

    def __post_init__(self) -> None:
        if isinstance(self.benchmarks, str):  # a single one in YAML, not in a list
            self.benchmarks = [self.benchmarks]
        if not self.benchmarks:
            raise ValueError("benchmarks is empty. Name some, such as HellaSwag or LAMBADA.")
        self.benchmark_options = as_mapping("benchmark_options", self.benchmark_options) or {}
        self.benchmark_settings()

    def benchmark_settings(self) -> BenchmarkSettings:
        """Return the benchmarks to run.

        Raises:
            ValueError, FileNotFoundError: a setting is out of its range.
        """
        assert isinstance(self.benchmark_options, dict), "__post_init__ has parsed it"
        return BenchmarkSettings(
            self.benchmarks, self.benchmark_options, self.benchmark_data, self.benchmark_scoring, self.batch_size
        )


SETTINGS = BenchmarkCommandSettings


def run(settings: BenchmarkCommandSettings) -> None:
    """Measure, and write the report."""
    with open_benchmarks(settings.benchmark_settings()) as benchmarks:
        opened = open_model(settings, needs_neighbors=settings.knowledge_base is not None)
        try:
            measured = {name: measure(settings, opened, name, benchmark) for name, benchmark in benchmarks.items()}
        finally:
            opened.close()
    write_report(Path(settings.output_dir), settings.name, measured)


def measure(settings: BenchmarkCommandSettings, opened: Opened, name: str, benchmark: Any) -> Measured:
    """Return what was answered to one benchmark, by task and condition.

    Raises:
        ValueError: the data have no questions, or lack what the benchmark reads.
    """
    kept = Kept(Path(settings.output_dir) / "parts" / name, _described(settings, opened, name))
    measured: Measured = {}
    conditions = conditions_of(opened.model)
    for condition in sorted(conditions):  # "off" first
        answerer = Answerer(opened.model, opened.tokenizer, settings.benchmark_settings(), conditions[condition])
        for task in benchmark.tasks or [None]:
            label = WHOLE if task is None else str(task.value)
            answered = _answer(
                kept, f"{name}_{NOT_IN_NAMES.sub('_', label)}_{condition}", answerer, name, benchmark, task
            )
            if answered.questions:
                measured.setdefault(label, {})[condition] = answered
    if not measured:
        raise ValueError(f"Benchmark {name}: its data have no questions of these tasks.")
    return measured


def _answer(kept: Kept, part: str, answerer: Answerer, name: str, benchmark: Any, task: Any) -> Answered:
    """Answer the questions of a task, or return the answers that were kept."""
    if name not in GENERATIVE:

        def choose() -> Arrays:
            return {"answered": np.array(json.dumps(asdict(answerer.choose(benchmark, task))))}

        return Answered(**json.loads(str(kept.arrays(part, choose)["answered"])))
    questions = read_questions(name, benchmark, task)

    def write(numbers: range) -> Arrays:
        answered = answerer.write(questions[numbers.start : numbers.stop])
        return {"predictions": np.array(answered.predictions)}

    written = kept.parts(part, len(questions), BATCHES_KEPT * answerer.batch_size, write)
    return Answered.written(questions, written["predictions"].tolist() if questions else [])


def _described(settings: BenchmarkCommandSettings, opened: Opened, name: str) -> Mapping[str, Any]:
    """Return what a benchmark's answers belong to. Tasks can be added later."""
    options = dict(settings.benchmark_settings().options.get(name, {}))
    options.pop("tasks", None)
    of = opened.describe() | {"options": options, "data": settings.benchmark_data, "batch_size": settings.batch_size}
    return of if name in GENERATIVE else of | {"scoring": settings.benchmark_scoring}
