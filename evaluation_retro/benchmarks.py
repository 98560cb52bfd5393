"""DeepEval's multiple-choice benchmarks for a RETRO model, with and without neighbors."""

import contextlib
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from retrieval import BulkTokenizer

SCORINGS = ("likelihood", "one_token")
# the last question's answers: lines such as "B. text" or "2. text" before "Answer:" or "A:"
OPTION = re.compile(r"^\(?([A-Za-z]|\d+)[.)] ?(.*)$")


@dataclass
class BenchmarkSettings:
    """Which benchmarks are run, and how.

    Attributes:
        names: classes of `deepeval.benchmarks`, such as HellaSwag, MMLU, Winogrande, ARC, TruthfulQA.
        options: name → arguments of its class; tasks by their values, such as {"MMLU": {"tasks": ["astronomy"], "n_shots": 0}}.
        data: folder with copies of the datasets, each under its name on the hub (data/Rowan/hellaswag); what is not there
            is loaded from the hub.
        scoring: "likelihood": the answer whose text is the most likely one after the question, by the mean over its bytes;
            "one_token": the answer whose letter is the most likely next token after the whole prompt.
        batch_size: sequences in a forward pass.

    Raises:
        ValueError: an unknown scoring, or a batch size below 1.
        FileNotFoundError: there is no folder `data`.
    """

    names: Sequence[str] = field(
        metadata={"help": "DeepEval benchmarks to run at each evaluation: HellaSwag MMLU Winogrande ARC TruthfulQA …"}
    )
    options: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        metadata={"help": "Arguments of the benchmarks' classes: {HellaSwag: {n_shots: 0, n_problems_per_task: 20}}."},
    )
    data: str | None = field(
        default=None, metadata={"help": "Folder with copies of the benchmarks' datasets, named as on the Hub."}
    )
    scoring: str = field(
        default="likelihood",
        metadata={
            "help": "likelihood compares the answers' texts; one_token compares their letters, as DeepEval does."
        },
    )
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise ValueError(f"Benchmarks are scored by {' or '.join(SCORINGS)}, not {self.scoring!r}.")
        if self.batch_size < 1:
            raise ValueError(f"The batch size of benchmarks must be at least 1, not {self.batch_size}.")
        if self.data is not None and not Path(self.data).is_dir():
            raise FileNotFoundError(f"There is no folder {self.data!r} with copies of the benchmarks' datasets.")

    def build(self) -> dict[str, Any]:
        """The benchmarks, ready to be run.

        Raises:
            ValueError: DeepEval is not installed or has no such benchmark, or that takes no such option or task.
        """
        deepeval = _deepeval()
        built = {}
        if unknown := set(self.options) - set(self.names):
            raise ValueError(
                f"There are options for {sorted(unknown)}, which is not among the benchmarks {self.names}."
            )
        for name in self.names:
            kind = getattr(deepeval.benchmarks, name, None)
            if kind is None:
                raise ValueError(
                    f"DeepEval has no benchmark {name!r}; it has {', '.join(deepeval.benchmarks.__all__)}."
                )
            options = dict(self.options.get(name, {}))
            tasks = getattr(deepeval.benchmarks.tasks, f"{name}Task", None)
            try:
                if "tasks" in options:
                    options["tasks"] = [tasks(task) for task in options["tasks"]]
                built[name] = kind(**options)
            except (TypeError, ValueError, AssertionError) as error:
                raise ValueError(f"Benchmark {name}: {error}") from error
        return built


def _deepeval() -> Any:
    """DeepEval, which must be told before it is imported to report nothing to anyone."""
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
    """Accuracy of each benchmark: "<name>_on" with the neighbors that the model's retriever finds, "<name>_off" without.

    A model without a retriever is measured without neighbors alone. Random states are left as they were.

    Raises:
        ValueError: as [`BenchmarkSettings.build`].
    """
    bulk_tokenizer = BulkTokenizer(tokenizer)
    conditions = {"off": {"use_retrieval": False}}
    if model.retriever is not None:
        conditions = {"on": {}} | conditions
    was_training = model.training
    model.eval()
    scores = {}
    try:
        with _own_randomness(), _local_datasets(settings.data):
            benchmarks = settings.build()  # once: each keeps its dataset
            for condition, arguments in conditions.items():
                for name, benchmark in benchmarks.items():
                    llm = _language_model(LikelihoodChoice(model, bulk_tokenizer, settings, arguments))
                    batched = (
                        {"batch_size": settings.batch_size}
                        if "batch_size" in signature(benchmark.evaluate).parameters
                        else {}
                    )
                    with contextlib.redirect_stdout(None):  # it prints every task's score
                        scores[f"{name}_{condition}"] = benchmark.evaluate(llm, **batched).overall_accuracy
    finally:
        model.train(was_training)
    return scores


class LikelihoodChoice:
    """Answers multiple-choice prompts by the likelihood of the answers."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: BulkTokenizer,
        settings: BenchmarkSettings,
        arguments: Mapping,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.arguments = model, tokenizer, settings, arguments

    def choose(self, prompts: Sequence[str], schemas: Sequence[Any]) -> list[Any]:
        """The schemas, each with the `answer` that is the most likely one after its prompt."""
        pairs: list[tuple[str, str]] = []
        choices: list[tuple[list[str], slice]] = []
        for prompt, schema in zip(prompts, schemas, strict=True):
            question, options = split_question(prompt)
            labels = [str(label) for label in get_args(schema.model_fields["answer"].annotation)] or list(options)
            if self.settings.scoring == "likelihood" and options:
                labels = [label for label in labels if label in options]
                texts = [(question, f" {options[label]}") for label in labels]
            else:
                texts = [(prompt.rstrip(), f" {label}") for label in labels]
            choices.append((labels, slice(len(pairs), len(pairs) + len(texts))))
            pairs += texts
        scores = self.log_likelihoods(pairs)
        answers = []
        for schema, (labels, place) in zip(schemas, choices, strict=True):
            lengths = [len(text.encode()) for _, text in pairs[place]]
            best = int(np.argmax([score / length for score, length in zip(scores[place], lengths, strict=True)]))
            annotation = schema.model_fields["answer"].annotation
            answers.append(schema(answer=int(labels[best]) if annotation is int else labels[best]))
        return answers

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Σ log p(continuation | context) for pairs (context, continuation), in batches; a long context loses its beginning."""
        most = self.model.config.n_positions
        end = self.tokenizer.eos_token_id
        rows = []
        for context, continuation in pairs:
            tokens, answer = self.tokenizer.encode_batch([context, continuation])
            rows.append(([end, *tokens, *answer][-most:], min(len(answer), most - 1)))
        scores = []
        for start in range(0, len(rows), self.settings.batch_size):
            batch = rows[start : start + self.settings.batch_size]
            longest = max(len(tokens) for tokens, _ in batch)
            ids = torch.tensor([[*tokens, *[end] * (longest - len(tokens))] for tokens, _ in batch])
            mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in batch])
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            logits = self.model(input_ids=ids, attention_mask=mask, **self.arguments).logits
            for row, (tokens, answer) in enumerate(batch):
                places = slice(len(tokens) - answer - 1, len(tokens) - 1)
                likely = logits[row, places].float().log_softmax(-1)
                scores.append(float(likely.gather(1, ids[row, len(tokens) - answer : len(tokens), None]).sum()))
        return scores


def split_question(prompt: str) -> tuple[str, dict[str, str]]:
    """A prompt's text before the answers to choose from, and these answers by their letter or number.

    Without such answers the second is empty and the first is the prompt.
    """
    lines = prompt.rstrip().split("\n")
    end = len(lines)
    while end and not OPTION.match(lines[end - 1]):
        end -= 1
    options: list[tuple[str, str]] = []
    place = end
    while place and (match := OPTION.match(lines[place - 1])):
        place -= 1
        options.insert(0, (match.group(1), match.group(2)))
        if match.group(1) in ("A", "a", "1"):
            break
    first = options[0][0] if options else ""
    if first not in ("A", "a", "1") or len(lines) - end > 2:
        return prompt, {}
    return "\n".join(lines[:place]), dict(options)


def _language_model(choice: LikelihoodChoice) -> Any:
    """Return the model as DeepEval wants it; the class can only be made when DeepEval is imported."""
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
def _own_randomness() -> Iterator[None]:
    """DeepEval seeds Python's own generator, on which a training run may depend."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _local_datasets(folder: str | None) -> Iterator[None]:
    """DeepEval calls `datasets.load_dataset` with names of the hub: those found in the folder are loaded from there."""
    if folder is None:
        yield
        return
    load = datasets.load_dataset

    def load_local(path: str, *args: Any, **kwargs: Any) -> Any:
        local = Path(folder) / path
        return load(str(local) if local.is_dir() else path, *args, **kwargs)

    with mock.patch.object(datasets, "load_dataset", load_local):
        yield
