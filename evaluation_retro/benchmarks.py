"""Run DeepEval's benchmarks on a RETRO model, with and without neighbors.

Answers are chosen by likelihood (`multiple_choice.py`) or written (`generative_benchmarks.py`).
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from retrieval import BulkTokenizer

from .generative_benchmarks import GENERATIVE, Question, TriviaQA, read_questions
from .multiple_choice import SCORINGS, LikelihoodChoice
from .written_answers import AnswerWriter, exact_match, f1

# Benchmarks that are not run, each with the reason.
REFUSED = {
    "EquityMedQA": "a judge model behind an API key scores it",
    "GSM8K": "its answers are worked out over several lines, which only instructed models do in DeepEval's format",
    "HumanEval": "it runs the code that a model writes",
    "IFEval": "it asks for instructions to be followed, which base models do not",
}


@dataclass
class BenchmarkSettings:
    """The benchmarks to run and how to run them. Each field's metadata has its help text.

    Raises:
        ValueError: the scoring is unknown, or the batch size is below 1.
        FileNotFoundError: the folder `data` does not exist.
    """

    names: Sequence[str] = field(
        metadata={"help": "Benchmarks to run: HellaSwag MMLU Winogrande ARC TruthfulQA LAMBADA SQuAD DROP TriviaQA …"}
    )
    options: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        metadata={
            "help": "Arguments of each class, tasks by value: {MMLU: {tasks: [astronomy], n_shots: 0}, "
            "HellaSwag: {n_problems_per_task: 20}}."
        },
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder with copies of the datasets, named as on the hub (Rowan/hellaswag, "
            "ai2_arc/ARC-Easy). Datasets that are not there are loaded from the hub."
        },
    )
    scoring: str = field(
        default="likelihood",
        metadata={
            "help": "How an answer is chosen: likelihood compares the answers' texts by log-likelihood per byte, "
            "one_token compares their letters after the whole prompt."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences in a forward pass."})

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"Benchmarks are scored by {' or '.join(SCORINGS)}, not {self.scoring!r}.")
        if self.batch_size < 1:
            raise ValueError(f"The batch size of benchmarks must be at least 1, not {self.batch_size}.")
        if self.data is not None and not Path(self.data).is_dir():
            raise FileNotFoundError(
                f"The folder {self.data!r} does not exist. Name the folder with copies of the benchmarks' datasets."
            )

    def build(self) -> dict[str, Any]:
        """Return DeepEval's benchmark objects by name.

        Raises:
            ValueError: DeepEval is not installed, or a benchmark, option or task is unknown.
        """
        deepeval = _import_deepeval()
        if unknown := set(self.options) - set(self.names):
            raise ValueError(
                f"There are options for {sorted(unknown)}, which is not among the benchmarks {self.names}."
            )
        return {name: self._build(deepeval, name) for name in self.names}

    def _build(self, deepeval: Any, name: str) -> Any:
        """Return one benchmark's object."""
        kind = TriviaQA if name == "TriviaQA" else getattr(deepeval.benchmarks, name, None)
        if kind is None:
            known = [*deepeval.benchmarks.__all__, "TriviaQA"]
            raise ValueError(
                f"DeepEval has no benchmark {name!r}; it has {', '.join(sorted(set(known) - REFUSED.keys()))}."
            )
        options = dict(self.options.get(name, {}))
        try:
            if "tasks" in options:
                kind_of_task = _names_of(deepeval.benchmarks.tasks, f"{name}Task", "tasks")
                options["tasks"] = [kind_of_task(task) for task in options["tasks"]]
            if "mode" in options:
                options["mode"] = _names_of(deepeval.benchmarks.modes, f"{name}Mode", "modes")(options["mode"])
                if options["mode"].name == "MC2":
                    raise ValueError("mode mc2 wants lists of answers, which are not scored here. Give mc1.")
            if name in REFUSED:
                raise ValueError(f"it is not run here: {REFUSED[name]}. Leave it out.")
            if name == "SQuAD":  # without a judge, DeepEval would want an API key
                options["evaluation_model"] = _deepeval_model(lambda prompts, schemas: [])
            return kind(**options)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"Benchmark {name}: {error}") from error


def _names_of(module: Any, kind: str, what: str) -> Any:
    """Return the names of a benchmark's tasks or modes, an enumeration."""
    names = getattr(module, kind, None)
    if names is None:
        raise ValueError(f"it has no {what}. Leave the option out.")
    return names


def _import_deepeval() -> Any:
    """Import DeepEval with its telemetry turned off, which must happen before the import."""
    os.environ["DEEPEVAL_TELEMETRY_OPT_OUT"] = "1"
    os.environ["DEEPEVAL_DISABLE_DOTENV"] = "1"
    try:
        import deepeval.benchmarks
        import deepeval.benchmarks.modes
        import deepeval.benchmarks.tasks
    except ImportError as error:
        raise ValueError("Benchmarks need DeepEval: pip install 'transformers-retro[evaluation]'.") from error
    return deepeval


@dataclass
class Answered:
    """The N questions of a task, as a model answered them.

    Attributes:
        questions: their texts.
        predictions: the model's answers.
        answers: for each question, all right answers.
        scores: for each measure ("accuracy", or "exact match" and "F1"), each question's, from 0
            to 1.
    """

    questions: list[str]
    predictions: list[str]
    answers: list[list[str]]
    scores: dict[str, list[float]]

    @classmethod
    def written(cls, questions: Sequence[Question], predictions: Sequence[str]) -> "Answered":
        """Score written answers."""
        answers = [question.answers for question in questions]
        pairs = [*zip(predictions, answers, strict=True)]
        scores = {"exact match": [exact_match(*pair) for pair in pairs], "F1": [f1(*pair) for pair in pairs]}
        return cls([question.text for question in questions], [*predictions], answers, scores)


def run_benchmarks(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, settings: BenchmarkSettings
) -> dict[str, float]:
    """Return each benchmark's accuracy with neighbors ("<name>_on") and without ("<name>_off").

    The accuracy of written answers is the share of exact matches. A model without a retriever is
    measured only without. Random states are left as they were.

    Args:
        model: a RETRO model, also with adapters.

    Raises:
        ValueError: see [`BenchmarkSettings.build`].
    """
    bulk_tokenizer = BulkTokenizer(tokenizer)
    was_training = model.training
    model.eval()
    scores = {}
    try:
        with open_benchmarks(settings) as benchmarks:  # once: each keeps its dataset
            for condition, arguments in conditions_of(model).items():
                answerer = Answerer(model, bulk_tokenizer, settings, arguments)
                for name, benchmark in benchmarks.items():
                    scores[f"{name}_{condition}"] = answerer.accuracy(name, benchmark)
    finally:
        model.train(was_training)
    return scores


def conditions_of(model: Any) -> dict[str, dict[str, Any]]:
    """Return the arguments of a model's calls by condition: with neighbors, if any, and without."""
    off: dict[str, dict[str, Any]] = {"off": {"use_retrieval": False}}
    return off if model.retriever is None else {"on": {}} | off


class Answerer:
    """Answers the questions of benchmarks under one condition.

    Args:
        model: a RETRO model in evaluation mode, also with adapters.
        settings: the scoring and the batch size.
        model_arguments: passed to the model, such as {"use_retrieval": False}.
    """

    def __init__(
        self, model: Any, tokenizer: BulkTokenizer, settings: BenchmarkSettings, model_arguments: Mapping[str, Any]
    ) -> None:
        self.batch_size = settings.batch_size
        self.choice = LikelihoodChoice(model, tokenizer, settings.scoring, settings.batch_size, model_arguments)
        self.writer = AnswerWriter(model, tokenizer, settings.batch_size, model_arguments)

    def accuracy(self, name: str, benchmark: Any) -> float:
        """Return the share of right answers over all tasks."""
        if name not in GENERATIVE:
            return self._evaluate(benchmark)
        questions = [
            question for task in benchmark.tasks or [None] for question in read_questions(name, benchmark, task)
        ]
        if not questions:
            raise ValueError(f"Benchmark {name}: its data have no questions of these tasks.")
        return float(np.mean(self.write(questions).scores["exact match"]))

    def write(self, questions: Sequence[Question]) -> Answered:
        """Write answers to questions of a generative benchmark."""
        return Answered.written(questions, self.writer.write([question.prompt for question in questions]))

    def choose(self, benchmark: Any, task: Any) -> Answered:
        """Answer the multiple-choice questions of one task.

        Args:
            benchmark: DeepEval's object.
            task: one of `benchmark.tasks`, or None for a benchmark without tasks.
        """
        all_tasks = benchmark.tasks
        try:
            benchmark.tasks = [] if task is None else [task]
            self._evaluate(benchmark)
        except ZeroDivisionError:  # DeepEval's, for a task without questions
            return Answered([], [], [], {"accuracy": []})
        finally:
            benchmark.tasks = all_tasks
        frame = benchmark.predictions
        texts = [frame[column].astype(str).tolist() for column in ("Input", "Prediction", "Expected Output")]
        scores = {"accuracy": frame["Correct"].astype(float).tolist()}
        return Answered(texts[0], texts[1], [[answer] for answer in texts[2]], scores)

    def _evaluate(self, benchmark: Any) -> float:
        """Let DeepEval run a benchmark; return its accuracy."""
        has_batches = "batch_size" in signature(benchmark.evaluate).parameters
        batches = {"batch_size": self.batch_size} if has_batches else {}
        with contextlib.redirect_stdout(None):  # it prints every task's score
            return benchmark.evaluate(_deepeval_model(self.choice.choose), **batches).overall_accuracy


def _deepeval_model(choose: Callable[[Sequence[str], Sequence[Any]], list[Any]]) -> Any:
    """Wrap a model for DeepEval, whose base class exists only after DeepEval's late import.

    Args:
        choose: answers prompts, as [`LikelihoodChoice.choose`] does.
    """
    from deepeval.models import DeepEvalBaseLLM

    class RetroLLM(DeepEvalBaseLLM):
        def load_model(self):
            return None  # it is there already

        def get_model_name(self):
            return "RETRO"

        def generate(self, prompt, schema):
            return choose([prompt], [schema])[0]

        async def a_generate(self, prompt, schema):
            return self.generate(prompt, schema)

        def batch_generate(self, prompts, schemas):
            return choose(prompts, schemas)

    return RetroLLM("RETRO")


@contextlib.contextmanager
def open_benchmarks(settings: BenchmarkSettings) -> Iterator[dict[str, Any]]:
    """Build DeepEval's benchmarks by name, which then read their data from `settings.data` first.

    Random states are left as they were.

    Raises:
        ValueError: see [`BenchmarkSettings.build`].
    """
    with _preserved_random_states(), _local_datasets(settings.data):
        yield settings.build()


@contextlib.contextmanager
def _preserved_random_states() -> Iterator[None]:
    """Restore the random states at the end: DeepEval seeds generators that training may use."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _local_datasets(folder: str | None) -> Iterator[None]:
    """Let `datasets.load_dataset` find datasets in a folder first.

    DeepEval calls it with names on the hub and has no setting for another place.
    """
    load = datasets.load_dataset

    def load_local(path: str, name: str | None = None, **kwargs: Any) -> Any:
        local = Path(folder or "", path)
        if name is not None and (local / name).is_dir():
            return load(str(local / name), **kwargs)
        return load(str(local) if local.is_dir() else path, name, **kwargs)

    if folder is not None:
        datasets.load_dataset = load_local
    try:
        yield
    finally:
        datasets.load_dataset = load
