"""The settings of a training run: three dataclasses, and the checks between them."""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments

from configuration_retro import RetroConfig
from data_retro.first_points import FirstPoints
from data_retro.mixtures import DocumentStream, check_mixture
from evaluation_retro.benchmarks import BenchmarkSettings
from evaluation_retro.opening import ModelSettings
from retrieval.arguments import KnowledgeBaseArguments
from retrieval.parsing import as_mapping, parse_settings, unknown_settings
from retrieval.settings import same_setting
from retrieval.sources import Source

from .checkpoints import checkpoint_to_resume

# An entry of train_data in YAML; metadata_fields is for knowledge bases alone.
STREAM_FIELDS = tuple(f.name for f in dataclasses.fields(DocumentStream) if f.name != "metadata_fields")


DEFAULT_BLOCK_SIZE = 2048  # most tokens in a sequence by default; many decoders have room for 131072


@dataclass
class ModelArguments:
    """The model to train, and which of its parameters to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Weights to start from, RETRO's or any decoder's: a Hub name or a folder. Default: train from "
            "scratch."
        },
    )
    gguf_file: str | None = same_setting(ModelSettings, "gguf_file")
    reader: str | None = same_setting(ModelSettings, "reader")
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, a Hub name or folder. By default the one beside the weights."}
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "RetroConfig fields, a mapping in YAML; as a flag, '{n_layer: 6, cca_layers: [2, 4]}'."},
    )
    freeze_backbone: bool | None = field(
        default=None,
        metadata={
            # a bare --freeze_backbone means true
            "nargs": "?",
            "const": True,
            "help": "RETROfit: train only what RETRO adds to the decoder, and freeze the decoder. By default true for "
            "weights of a decoder other than GPT-2, if there is a knowledge base and no lora.",
        },
    )
    lora: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters: fields of peft.LoraConfig, a mapping or '{r: 8, target_modules: [c_attn]}'. "
            "RETRO's new parts, if no weights were loaded for them, are trained in full (modules_to_save)."
        },
    )

    def __post_init__(self) -> None:
        self.config_overrides = as_mapping("config_overrides", self.config_overrides) or {}
        self.lora = as_mapping("lora", self.lora)
        known = {f.name for f in dataclasses.fields(RetroConfig)} | set(RetroConfig.attribute_map)
        if unknown := sorted(set(self.config_overrides) - known):
            raise ValueError(unknown_settings("config_overrides has", unknown, known))
        if self.model_name_or_path is None and self.tokenizer_name is None:
            raise ValueError(
                "Neither model_name_or_path nor tokenizer_name is given. Training from weights needs the former, "
                "training from scratch the latter."
            )
        for name in ("gguf_file", "reader"):
            if getattr(self, name) is not None and self.model_name_or_path is None:
                raise ValueError(f"{name} is given, but model_name_or_path is not. Name the decoder or its folder.")
        if self.lora is not None and self.freeze_backbone:
            raise ValueError("lora and freeze_backbone both choose what is trained. Give one of them.")


@dataclass
class DataArguments(KnowledgeBaseArguments):
    """The training text, and the knowledge base to fetch its neighbors from."""

    train_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Sources to train on: files, folders, or names of datasets. In YAML an entry may be a mapping of "
            f"{', '.join(STREAM_FIELDS)}."
        },
    )
    validation_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Sources to evaluate on, in the form of train_data. Default: no evaluation."},
    )
    text_field: str = same_setting(Source, "text_field")
    doc_id_field: str | None = same_setting(Source, "doc_id_field")
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in a training sequence. By default the model's n_positions, but at most "
            f"{DEFAULT_BLOCK_SIZE} on a decoder other than GPT-2."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Tokenize and pack while training, for data larger than the disk. Needs max_steps."},
    )
    random_first_point: bool | None = field(
        default=None,
        metadata={
            "help": "Give each training sequence a first retrieval point of its own, which follows from the seed and "
            "its tokens, so that short queries are trained, too. By default false; precomputed sequences keep theirs."
        },
    )
    neighbor_cache_size: int = field(
        default=100_000,
        metadata={"help": "Chunks whose neighbors are kept in memory between epochs, about 3 kB each. 0: none."},
    )
    prefetch_batches: int = field(
        default=4,
        metadata={
            "help": "Batches to prepare ahead, with their neighbors, while the model computes (never fewer than one "
            "update needs). 0: prepare none."
        },
    )
    precompute_to: str | None = field(
        default=None,
        metadata={"help": "New folder. Store the sequences with their neighbors there instead of training."},
    )
    precomputed: str | None = field(
        default=None,
        metadata={"help": "Train on this folder, which --precompute_to has made with the same settings."},
    )

    def __post_init__(self) -> None:
        for name in ("train_data", "validation_data"):
            entries = getattr(self, name)
            if entries is None or isinstance(entries, str | dict):  # in YAML, none, or one without a list
                setattr(self, name, [] if entries is None else [entries])
        has_data = {name: bool(self.streams(name)) for name in ("train_data", "validation_data")}
        for name in [name for name, given in has_data.items() if given and self.precomputed is not None]:
            raise ValueError(f"Both {name} and precomputed are given. Leave {name} out: precomputed holds it.")
        packed = [*([] if self.streaming else self.streams("train_data")), *self.streams("validation_data")]
        for stream in [stream for stream in packed if stream.initially_skip]:
            raise ValueError(
                f"{stream.where}initially_skip is for the first epoch of a stream, but this text is packed once, for "
                "all epochs. Set streaming: true for train_data, or use skip."
            )
        if self.precompute_to is not None and Path(self.precompute_to).exists():
            raise ValueError(f"{self.precompute_to} exists already. Precompute into a new folder, or delete it.")
        if self.precompute_to is not None and self.knowledge_base is None:
            raise ValueError("precompute_to stores neighbors, but there is no knowledge base. Give a knowledge_base.")
        if self.streaming and (self.precomputed is not None or self.precompute_to is not None):
            raise ValueError(
                "streaming packs text during training, but precomputed neighbors need text packed before it. Use only "
                "one of them."
            )
        if self.prefetch_batches < 0:
            raise ValueError(f"prefetch_batches is {self.prefetch_batches}. It must be 0 (none) or more.")

    @property
    def has_neighbors(self) -> bool:
        """True if the model reads neighbors in training."""
        return self.knowledge_base is not None or self.precomputed is not None

    @property
    def evaluates(self) -> bool:
        """True if there may be data to evaluate on."""
        return bool(self.validation_data) or self.precomputed is not None

    def first_points(self, config: RetroConfig, seed: int) -> FirstPoints | None:
        """Return what draws the training sequences' first points, None for the paper's grid."""
        if not self.has_neighbors or not self.random_first_point:
            return None
        assert config.retrieval_stride is not None, "set when the configuration is built"
        return FirstPoints(seed, config.chunk_size, config.retrieval_stride)

    def streams(self, part: str) -> list[DocumentStream]:
        """Return the sources of "train_data" or "validation_data".

        Raises:
            ValueError: an entry has an unknown key or a wrong value, or the entries make no
                mixture.
        """
        streams = []
        for entry in getattr(self, part):
            settings = {"dataset": entry} if isinstance(entry, str) else entry
            if not isinstance(settings, dict):
                raise ValueError(f"{part}: {entry!r} is neither a name nor a mapping of settings.")
            if unknown := sorted(set(settings) - set(STREAM_FIELDS)):
                raise ValueError(unknown_settings(f"{part} has", unknown, STREAM_FIELDS))
            common: dict[str, Any] = {"text_field": self.text_field, "doc_id_field": self.doc_id_field, "dataset": ""}
            streams.append(DocumentStream(**common | settings))
        check_mixture(streams)
        return streams

    def sequence_length(self, config: RetroConfig) -> int:
        """Return the tokens in a sequence, `block_size` or the default for this model."""
        if self.block_size is not None:
            return self.block_size
        return config.n_positions if config.text_config is None else min(config.n_positions, DEFAULT_BLOCK_SIZE)


@dataclass
class RetroTrainingArguments(TrainingArguments):
    """Trainer's arguments and RETRO's; some defaults follow nanoGPT's GPT-2 settings."""

    learning_rate: float = field(default=6e-4, metadata={"help": "AdamW's peak learning rate."})
    weight_decay: float = field(
        default=0.1, metadata={"help": "AdamW's weight decay. It applies to matrices, not to biases and norms."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second-moment decay rate."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine_with_min_lr",
        metadata={"help": "Learning rate schedule. cosine_with_min_lr falls to a tenth of the peak."},
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The schedule's arguments. cosine_with_min_lr has {min_lr_rate: 0.1} by default."},
    )
    warmup_steps: float = field(default=0.01, metadata={"help": "Warm-up: a number of steps, or a share if below 1."})
    eval_only: bool = field(
        default=False, metadata={"help": "Evaluate the model on validation_data, and train nothing. Saves the numbers."}
    )
    retro_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of what RETRO adds to the decoder. By default learning_rate."},
    )
    neighbor_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of sequences that train without neighbors, to keep the model good without them."},
    )
    neighbor_shuffle: float | None = field(
        default=None,
        metadata={
            "help": "Share of chunks that train with another sequence's neighbors, to learn which to trust. By default "
            "0.2 with a copy head, else 0."
        },
    )
    device_peak_tflops: float | None = field(
        default=None,
        metadata={"help": "One device's peak TFLOP/s at the training precision. Logs the model-FLOP utilization."},
    )
    benchmarks: list[str] = same_setting(BenchmarkSettings, "names", default_factory=list)
    benchmark_options: dict[str, Any] | str | None = same_setting(BenchmarkSettings, "options")
    benchmark_data: str | None = same_setting(BenchmarkSettings, "data")
    benchmark_scoring: str = same_setting(BenchmarkSettings, "scoring")
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where to report, such as tensorboard or wandb. none: only the console."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads columns that the model does not."}
    )

    def __post_init__(self) -> None:
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        super().__post_init__()
        # Without an accelerator, pinning only prints a warning.
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        self.benchmark_options = as_mapping("benchmark_options", self.benchmark_options) or {}
        if isinstance(self.benchmarks, str):  # a single one in YAML, not in a list
            self.benchmarks = [self.benchmarks]
        for name, what in (("neighbor_dropout", "sequences"), ("neighbor_shuffle", "chunks")):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"{name} is {share}. It is a share of the {what}: give at least 0 and less than 1.")
        if self.device_peak_tflops is not None and not self.device_peak_tflops > 0:
            raise ValueError(f"device_peak_tflops is {self.device_peak_tflops}. It must be above 0.")
        evaluates = self.eval_only or self.eval_strategy != IntervalStrategy.NO
        if self.benchmark_settings() is not None and not evaluates:
            raise ValueError("benchmarks run at each evaluation, but eval_strategy is 'no'. Set it to steps or epoch.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is True, but the collator reads doc_ids. Leave it False.")

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments beside the weights, and a checkpoint that is shared must not
        # hold a token.
        return self.__dict__ | {"hub_token": None}

    def __copy__(self) -> "RetroTrainingArguments":
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)  # with the token, unlike the pickled state
        return twin

    def __deepcopy__(self, memo: dict) -> "RetroTrainingArguments":
        twin = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def device(self) -> torch.device:
        """The device of this process; "cpu" without a number."""
        # accelerate numbers the processes' CPUs, but safetensors reads no tensors onto "cpu:0".
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def benchmark_settings(self) -> BenchmarkSettings | None:
        """Return the benchmarks that run at each evaluation.

        Raises:
            ValueError, FileNotFoundError: a setting is out of its range.
        """
        if not self.benchmarks:
            return None
        assert isinstance(self.benchmark_options, dict), "__post_init__ has parsed it"
        return BenchmarkSettings(
            self.benchmarks,
            self.benchmark_options,
            self.benchmark_data,
            self.benchmark_scoring,
            self.per_device_eval_batch_size,
        )


def check_settings(model: ModelArguments, data: DataArguments, training: RetroTrainingArguments) -> None:
    """Check the settings against each other, before anything is loaded.

    Raises:
        ValueError: two settings contradict each other, or a benchmark cannot run.
    """
    workers, processes = training.dataloader_num_workers, training.world_size
    evaluation = IntervalStrategy(training.eval_strategy).value
    writing = {"precompute_to": data.precompute_to, "push_to_hub": training.push_to_hub}
    given = [name for name, value in writing.items() if value]
    for is_wrong, message in (
        (
            not (training.eval_only or data.train_data or data.precomputed),
            "train_data is empty. Name the files, folders or datasets to train on.",
        ),
        (
            training.eval_only and not data.evaluates,
            "eval_only measures a model on validation_data, which is empty. Name sources to evaluate on.",
        ),
        (
            training.eval_only and bool(given),
            f"eval_only only measures, but {' and '.join(given)} is set, too. Leave one of them out.",
        ),
        (
            training.eval_only and training.resume_from_checkpoint is not None,
            f"eval_only does not resume a run, but resume_from_checkpoint is {training.resume_from_checkpoint!r}. To "
            "measure a checkpoint, name its folder in model_name_or_path.",
        ),
        (
            model.freeze_backbone and not data.has_neighbors,
            "freeze_backbone trains only what reads neighbors, and there are none without a knowledge_base. Give one, "
            "or leave freeze_backbone out.",
        ),
        (
            data.precompute_to is not None and processes > 1,
            f"precompute_to runs in one process, but there are {processes}. Start one.",
        ),
        (data.streaming and not training.eval_only and training.max_steps <= 0, "streaming has no end: set max_steps."),
        (
            data.streaming and workers,
            f"dataloader_num_workers is {workers}: a stream is read by the process that trains on it, ahead of the "
            "model (prefetch_batches). Set it to 0.",
        ),
        (
            data.knowledge_base is not None and workers,
            f"dataloader_num_workers is {workers}: neighbors are fetched ahead by a thread of the training process "
            "(prefetch_batches), which counts failed searches. Set it to 0.",
        ),
        (
            evaluation != "no" and not data.evaluates,
            f"eval_strategy is {evaluation!r}, but validation_data is empty. Name sources to evaluate on.",
        ),
        (
            data.has_neighbors and data.evaluates and training.per_device_eval_batch_size < 2,
            "per_device_eval_batch_size is 1, but a sequence is also measured with the neighbors of another one in its "
            "batch. Set it to 2 or more.",
        ),
    ):
        if is_wrong:
            raise ValueError(message)
    if (benchmarks := training.benchmark_settings()) is not None:
        benchmarks.build()


Arguments = tuple[ModelArguments, DataArguments, RetroTrainingArguments]


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Parse flags, or one YAML file and flags that override it.

    An error ends the program with a message.
    """

    def check(model: ModelArguments, data: DataArguments, training: RetroTrainingArguments) -> None:
        assert training.output_dir is not None, "TrainingArguments has set it"
        training.resume_from_checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
        check_settings(model, data, training)

    kinds = (ModelArguments, DataArguments, RetroTrainingArguments)
    model, data, training = parse_settings(kinds, "train_hf.py", argv, check)
    return model, data, training
