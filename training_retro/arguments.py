"""The settings of a training run: flags, or one YAML file of the same names, or both."""

import dataclasses
import difflib
import json
import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, SchedulerType, TrainingArguments

from configuration_retro import RetroConfig
from data_retro.mixtures import DocumentStream, check_mixture
from evaluation_retro.benchmarks import BenchmarkSettings
from retrieval.arguments import KnowledgeBaseArguments


@dataclass
class ModelArguments:
    """Which model is trained, and which of its parameters."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "GPT-2 or RETRO weights to start from, a hub name or folder; none: from scratch."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, a hub name or folder. Default: the one beside the weights."}
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "RetroConfig fields, as a mapping in YAML or '{n_layer: 6, cca_layers: [2, 4]}' as a flag."},
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "RETROfit: train only what RETRO adds to GPT-2, and leave GPT-2 as it is."}
    )
    lora: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Train adapters, and whole what of RETRO is still untrained (modules_to_save): peft.LoraConfig fields, as a "
            "mapping or '{r: 8, target_modules: [c_attn]}'."
        },
    )

    def __post_init__(self):
        overrides = self.config_overrides = _mapping("config_overrides", self.config_overrides) or {}
        self.lora = _mapping("lora", self.lora)
        known = {f.name for f in dataclasses.fields(RetroConfig)} | set(RetroConfig.attribute_map)
        if unknown := sorted(set(overrides) - known):
            raise ValueError(_unknown("config_overrides has", unknown, known))


@dataclass
class DataArguments(KnowledgeBaseArguments):
    """The text, and the knowledge base that its chunks read from."""

    train_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Text files, folders, JSONL or Parquet files or `datasets` names to train on; in YAML an entry may be a "
            "mapping with the fields of data_retro.mixtures.DocumentStream: dataset, weight, filter, shuffle_buffer …"
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Tokenize and pack while training instead of before, for data larger than the disk; needs max_steps."
        },
    )
    validation_data: list[str] = field(
        default_factory=list, metadata={"help": "The same, to evaluate on. Default: no evaluation."}
    )
    text_field: str = field(default="text", metadata={"help": "Field of a JSONL line or dataset row with the text."})
    doc_id_field: str | None = field(
        default=None,
        metadata={
            "help": "Field with the document's id, as given when the knowledge base was built from the same text."
        },
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens in a training sequence. Default: the model's n_positions."}
    )
    neighbor_cache_size: int = field(
        default=100_000,
        metadata={"help": "Chunks whose neighbors are kept in memory between epochs; about 3 kB each."},
    )
    prefetch_batches: int = field(
        default=4,
        metadata={
            "help": "Batches whose neighbors are fetched ahead while the model computes, at least those of one update; 0: none."
        },
    )
    precomputed: str | None = field(
        default=None,
        metadata={
            "help": "Folder of sequences with their neighbors, made earlier by the same settings and --precompute_to."
        },
    )
    precompute_to: str | None = field(
        default=None, metadata={"help": "Store the sequences with their neighbors in this folder, and do not train."}
    )

    @property
    def has_neighbors(self) -> bool:
        """True if the model that is trained reads neighbors."""
        return self.knowledge_base is not None or self.precomputed is not None

    def streams(self, part: str) -> list[DocumentStream]:
        """The sources of "train_data" or "validation_data".

        Raises:
            ValueError: an entry with an unknown key or a bad value; weights that cannot be.
        """
        streams = []
        for entry in getattr(self, part):
            settings = {"dataset": entry} if isinstance(entry, str) else entry
            if not isinstance(settings, dict):
                raise ValueError(f"{part}: {entry!r} is neither a name nor a mapping of settings.")
            known = {f.name for f in dataclasses.fields(DocumentStream)}
            if unknown := sorted(set(settings) - known):
                raise ValueError(_unknown(f"{part} has", unknown, known))
            common = {"text_field": self.text_field, "doc_id_field": self.doc_id_field, "dataset": ""}
            streams.append(DocumentStream(**common | settings))
        check_mixture(streams)
        return streams

    def __post_init__(self):
        for name in ("train_data", "validation_data"):
            if isinstance(getattr(self, name), str | dict):  # one entry in YAML, written without a list
                setattr(self, name, [getattr(self, name)])


@dataclass
class RetroTrainingArguments(TrainingArguments):
    """Trainer's own arguments, with nanoGPT's defaults where those of GPT-2's pre-training are other than Trainer's."""

    learning_rate: float = field(
        default=6e-4, metadata={"help": "Peak learning rate of AdamW (nanoGPT's for GPT-2 small)."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Of matrices; biases and norms have none."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Of AdamW."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine_with_min_lr",
        metadata={"help": "Learning rate schedule. Default: cosine to a tenth of the peak."},
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Of the schedule. Default for cosine_with_min_lr: {"min_lr_rate": 0.1}.'}
    )
    warmup_steps: float = field(default=0.01, metadata={"help": "Steps of warm-up, or their share of all if below 1."})
    retro_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of what RETRO adds to GPT-2, when both are trained. Default: learning_rate."},
    )
    neighbor_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of sequences trained without neighbors, so that the model is good without them too."},
    )
    neighbor_shuffle: float | None = field(
        default=None,
        metadata={
            "help": "Share of chunks trained with the neighbors of another sequence, so that the model learns which to trust. "
            "Default: 0.2 for a model with a copy head, else 0."
        },
    )
    device_peak_tflops: float | None = field(
        default=None,
        metadata={"help": "Of one device, in the precision of training; the log then has the model-FLOP utilization."},
    )
    benchmarks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "DeepEval benchmarks run at each evaluation, by class: HellaSwag MMLU Winogrande ARC TruthfulQA …"
        },
    )
    benchmark_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of their classes: {HellaSwag: {n_shots: 0, n_problems_per_task: 20}}."},
    )
    benchmark_data: str | None = field(
        default=None, metadata={"help": "Folder with copies of their datasets, named as on the hub."}
    )
    benchmark_scoring: str = field(
        default="likelihood",
        metadata={"help": "likelihood of the answers' texts, or one_token: their letters, as DeepEval generates them."},
    )
    report_to: None | str | list[str] = field(
        default="none",
        metadata={"help": "Where to report to, such as tensorboard or wandb. Default: the console only."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator reads columns that the model does not."}
    )

    def __post_init__(self):
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        super().__post_init__()
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # or every run on a CPU begins with a warning
        self.benchmark_options = _mapping("benchmark_options", self.benchmark_options)
        if isinstance(self.benchmarks, str):  # one in YAML, written without a list
            self.benchmarks = [self.benchmarks]
        if not 0 <= self.neighbor_dropout < 1:
            raise ValueError(
                f"neighbor_dropout is a share of the sequences, from 0 to below 1, not {self.neighbor_dropout}."
            )
        if self.neighbor_shuffle is not None and not 0 <= self.neighbor_shuffle < 1:
            raise ValueError(
                f"neighbor_shuffle is a share of the chunks, from 0 to below 1, not {self.neighbor_shuffle}."
            )
        if self.device_peak_tflops is not None and not self.device_peak_tflops > 0:
            raise ValueError(f"device_peak_tflops must be a positive number, not {self.device_peak_tflops}.")

    @cached_property
    def _setup_devices(self) -> torch.device:
        # accelerate numbers the processes' CPUs, and no checkpoint of tensors can be read onto a "cpu:0"
        device = super()._setup_devices
        return torch.device("cpu") if device.type == "cpu" else device

    def benchmark_settings(self) -> BenchmarkSettings | None:
        """Return the benchmarks that run at each evaluation. Raises ValueError if one cannot run."""
        if not self.benchmarks:
            return None
        settings = BenchmarkSettings(
            self.benchmarks,
            self.benchmark_options or {},
            self.benchmark_data,
            self.benchmark_scoring,
            self.per_device_eval_batch_size,
        )
        settings.build()
        return settings


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: to PyYAML, 6e-5 is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


def _mapping(name: str, value: dict | str | None) -> dict | None:
    """A mapping, also where a flag has it as text."""
    if isinstance(value, str):
        value = yaml.load(value, _Loader)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must map names to values, like '{{n_layer: 6}}', not {value!r}.")
    return value


Arguments = tuple[ModelArguments, DataArguments, RetroTrainingArguments]


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Flags, or one YAML file and flags that override it. Ends the program with a message if they make no sense."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, RetroTrainingArguments),
        prog="train_hf.py",
        usage="train_hf.py [config.yaml] [--name value ...]   (--help lists the names)",
        allow_abbrev=False,
    )
    known = {f.name for kind in parser.dataclass_types for f in dataclasses.fields(kind) if f.init}
    try:
        if argv and not argv[0].startswith("-"):
            settings = _read_yaml(Path(argv.pop(0)))
            if unknown := sorted(set(settings) - known):
                raise ValueError(_unknown("the configuration file has", unknown, known))
            # numbers as text: the parser converts and checks text alone
            parser.set_defaults(**{k: str(v) if isinstance(v, (int, float)) else v for k, v in settings.items()})
        *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if rest:
            unknown = [word.lstrip("-").partition("=")[0] for word in rest if word.startswith("-")] or rest
            raise ValueError(_unknown("there are", unknown, known))
        arguments = tuple(parsed)
        _check_arguments(*arguments)
        arguments[2].resume_from_checkpoint = _checkpoint(arguments[2])
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    return arguments


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {str(path)!r}.")
    text = path.read_text(encoding="utf-8")
    settings = yaml.load(text, _Loader) or {}
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} must map names to values, such as 'block_size: 512'; it is a {type(settings).__name__}."
        )
    plain = yaml.safe_load(text)  # what is text there stays text: the parser knows whether a number is wanted
    return {name: plain[name] if isinstance(plain[name], str) else value for name, value in settings.items()}


def _unknown(where: str, unknown: list[str], known: set[str]) -> str:
    hints = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    listed = ", ".join(f"{name} (did you mean {close[0]}?)" if close else name for name, close in hints.items())
    return f"{where} unknown settings: {listed}"


def _check_arguments(model: ModelArguments, data: DataArguments, training: RetroTrainingArguments) -> None:
    """Check the settings before anything is loaded."""
    retrieves = data.has_neighbors
    data.streams("validation_data")
    if data.streams("train_data") and data.precomputed:
        raise ValueError("Give train_data or precomputed: what is precomputed holds the training data.")
    if data.validation_data and data.precomputed:
        raise ValueError("Give validation_data or precomputed: it is stored beside the training data by precompute_to.")
    if not data.train_data and not data.precomputed:
        raise ValueError("train_data is empty: name the files, folders or dataset to train on.")
    if model.model_name_or_path is None and model.tokenizer_name is None:
        raise ValueError("Training from scratch needs tokenizer_name, training from weights needs model_name_or_path.")
    if model.freeze_backbone and not retrieves:
        raise ValueError(
            "freeze_backbone trains only what reads neighbors, and without a knowledge_base there are none: "
            "nothing would be trained. Give a knowledge_base, or leave freeze_backbone out."
        )
    if data.precompute_to is not None and Path(data.precompute_to).exists():
        raise ValueError(f"{data.precompute_to} is there already: precompute into a new folder, or delete it.")
    if data.precompute_to is not None and data.knowledge_base is None:
        raise ValueError("precompute_to stores neighbors, and without a knowledge_base there are none.")
    if data.precompute_to is not None and training.world_size > 1:
        raise ValueError(f"precompute_to runs in one process, not in {training.world_size}.")
    if data.streaming and (data.precomputed or data.precompute_to):
        raise ValueError("streaming packs while it trains; precomputed neighbors need it done before. Use one of them.")
    if data.streaming and training.max_steps <= 0:
        raise ValueError("streaming has no end: set max_steps.")
    if data.streaming and training.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers is {training.dataloader_num_workers}: a stream is read by the process that trains on it, "
            "ahead of the model (prefetch_batches). Set it to 0."
        )
    if training.benchmark_settings() is not None and training.eval_strategy == "no":
        raise ValueError("benchmarks run at each evaluation, and eval_strategy is 'no': set it to steps or epoch.")
    if data.prefetch_batches < 0:
        raise ValueError(f"prefetch_batches is {data.prefetch_batches}; it must be 0 (none) or more.")
    if model.lora is not None and model.freeze_backbone:
        raise ValueError("lora and freeze_backbone each choose what is trained: give one of them.")
    if training.eval_strategy != "no" and not (data.validation_data or data.precomputed):
        raise ValueError(f"eval_strategy is {training.eval_strategy.value!r}, but validation_data is empty.")
    if training.remove_unused_columns:
        raise ValueError("remove_unused_columns must stay false: the collator reads doc_ids, which the model does not.")
    if data.knowledge_base is not None and training.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers is {training.dataloader_num_workers}: neighbors are fetched ahead by a thread of the "
            "training process (prefetch_batches), which counts failed searches. Set it to 0."
        )
    if retrieves and (data.validation_data or data.precomputed) and training.per_device_eval_batch_size < 2:
        raise ValueError(
            "per_device_eval_batch_size is 1: the shuffled neighbors of a sequence come from another one in its batch. "
            "Set it to 2 or more."
        )


def last_whole_checkpoint(output_dir: str) -> str | None:
    """The latest checkpoint with its trainer_state.json, which is written when all else is there."""
    numbered = ((path.name.removeprefix("checkpoint-"), path) for path in Path(output_dir).glob("checkpoint-*"))
    folders = {int(number): path for number, path in numbered if number.isdecimal()}
    latest_first = (folders[step] for step in sorted(folders, reverse=True))
    return next((str(folder) for folder in latest_first if _is_whole(folder)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):  # none, or one that was cut off
        return False


def _checkpoint(training: RetroTrainingArguments) -> str | None:
    """The folder that `resume_from_checkpoint` means: a path, or with `true` the last one in output_dir."""
    asked = training.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    last = last_whole_checkpoint(training.output_dir)
    folder = last if asked.lower() == "true" else asked
    if folder is None:
        raise ValueError(
            f"resume_from_checkpoint is true, but there is no checkpoint in {training.output_dir!r} (output_dir)."
        )
    if not _is_whole(Path(folder)):
        raise ValueError(
            f"resume_from_checkpoint: {folder!r} is no whole checkpoint of a training run (no whole trainer_state.json)."
        )
    return folder
