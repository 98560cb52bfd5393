"""Run DeepEval's multiple-choice benchmarks on a RETRO model, with and without neighbors."""

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from retrieval import BulkTokenizer

from .multiple_choice import SCORINGS, LikelihoodChoice


@dataclass
class BenchmarkSettings:
    """The benchmarks to run and how to run them. Each field's metadata has its help text.

    Raises:
        ValueError: the scoring is unknown, or the batch size is below 1.
        FileNotFoundError: the folder `data` does not exist.
    """

    names: Sequence[str] = field(
        metadata={"help": "DeepEval benchmarks to run: HellaSwag MMLU Winogrande ARC TruthfulQA …"}
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
            "help": "Folder with copies of the datasets, named as on the hub (Rowan/hellaswag). "
            "Datasets that are not there are loaded from the hub."
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
        built = {}
        for name in self.names:
            kind = getattr(deepeval.benchmarks, name, None)
            if kind is None:
                raise ValueError(
                    f"DeepEval has no benchmark {name!r}; it has {', '.join(deepeval.benchmarks.__all__)}."
                )
            options = dict(self.options.get(name, {}))
            try:
                if "tasks" in options:
                    task_names = getattr(deepeval.benchmarks.tasks, f"{name}Task", None)
                    if task_names is None:
                        raise ValueError("it has no tasks. Leave the option out.")
                    options["tasks"] = [task_names(task) for task in options["tasks"]]
                built[name] = kind(**options)
            except (TypeError, ValueError, AssertionError) as error:
                raise ValueError(f"Benchmark {name}: {error}") from error
        return built


def _import_deepeval() -> Any:
    """Import DeepEval with its telemetry turned off, which must happen before the import."""
    os.environ["DEEPEVAL_TELEMETRY_OPT_OUT"] = "1"
    os.environ["DEEPEVAL_DISABLE_DOTENV"] = "1"
    try:
        import deepeval.benchmarks
        import deepeval.benchmarks.tasks
    except ImportError as error:
        raise ValueError("Benchmarks need DeepEval: pip install 'transformers-retro[evaluation]'.") from error
    return deepeval


def run_benchmarks(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, settings: BenchmarkSettings
) -> dict[str, float]:
    """Return each benchmark's accuracy with neighbors ("<name>_on") and without ("<name>_off").

    A model without a retriever is measured only without. Random states are left as they were.

    Args:
        model: a RETRO model, also with adapters.

    Raises:
        ValueError: see [`BenchmarkSettings.build`].
    """
    bulk_tokenizer = BulkTokenizer(tokenizer)
    conditions: dict[str, dict[str, Any]] = {"off": {"use_retrieval": False}}
    if model.retriever is not None:
        conditions = {"on": {}} | conditions
    was_training = model.training
    model.eval()
    scores = {}
    try:
        with _preserved_random_states(), _local_datasets(settings.data):
            benchmarks = settings.build()  # once: each keeps its dataset
            for condition, arguments in conditions.items():
                choice = LikelihoodChoice(model, bulk_tokenizer, settings.scoring, settings.batch_size, arguments)
                llm = _deepeval_model(choice)
                for name, benchmark in benchmarks.items():
                    has_batches = "batch_size" in signature(benchmark.evaluate).parameters
                    batches = {"batch_size": settings.batch_size} if has_batches else {}
                    with contextlib.redirect_stdout(None):  # it prints every task's score
                        scores[f"{name}_{condition}"] = benchmark.evaluate(llm, **batches).overall_accuracy
    finally:
        model.train(was_training)
    return scores


def _deepeval_model(choice: LikelihoodChoice) -> Any:
    """Wrap the model for DeepEval, whose base class exists only after DeepEval's late import."""
    from deepeval.models import DeepEvalBaseLLM

    class RetroLLM(DeepEvalBaseLLM):
        def load_model(self):
            return choice.model

        def get_model_name(self):
            return "RETRO"

        def generate(self, prompt, schema):
            return choice.choose([prompt], [schema])[0]

        async def a_generate(self, prompt, schema):
            return self.generate(prompt, schema)

        def batch_generate(self, prompts, schemas):
            return choice.choose(prompts, schemas)

    return RetroLLM("RETRO")


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

    def load_local(path: str, *args: Any, **kwargs: Any) -> Any:
        local = Path(folder or "", path)
        return load(str(local) if local.is_dir() else path, *args, **kwargs)

    if folder is not None:
        datasets.load_dataset = load_local
    try:
        yield
    finally:
        datasets.load_dataset = load
