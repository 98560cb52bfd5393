"""Train RETRO with `Trainer`: from scratch, from GPT-2 or RETRO weights, as a RETROfit, or resumed.

    python train_hf.py examples/train_local.yaml --learning_rate 1e-3
    accelerate launch train_hf.py --model_name_or_path gpt2 --freeze_backbone --train_data texts/ --knowledge_base kb.db

Settings are flags, or one YAML file of the same names, or both: flags win. Neighbors are fetched while training. Without
a knowledge base only the GPT-2 decoder is trained, which can be RETROfitted later.
"""

import dataclasses
import difflib
import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from configuration_retro import RetroConfig
from evaluation_retro import Evaluation, byte_lengths, sequence_nats
from modeling_retro import RetroForCausalLM
from modeling_retro.sharing import write_code
from retrieval import BulkTokenizer, KnowledgeBaseError, read_all
from retrieval.arguments import KnowledgeBaseArguments
from retrieval.chunking import tokenize_documents
from retrieval.collator import RetroDataCollator
from retrieval.packing import pack, packed_dataset

logger = logging.getLogger("train_hf")


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

    def __post_init__(self):
        if isinstance(self.config_overrides, str):
            self.config_overrides = yaml.safe_load(self.config_overrides)
        overrides = self.config_overrides = self.config_overrides or {}
        if not isinstance(overrides, dict):
            raise ValueError(f"config_overrides must map names to values, like '{{n_layer: 6}}', not {overrides!r}.")
        known = {f.name for f in dataclasses.fields(RetroConfig)} | set(RetroConfig.attribute_map)
        if unknown := sorted(set(overrides) - known):
            raise ValueError(_unknown("config_overrides has", unknown, known))


@dataclass
class DataArguments(KnowledgeBaseArguments):
    """The text, and the knowledge base that its chunks read from."""

    train_data: list[str] = field(
        default_factory=list, metadata={"help": "Text files, folders, JSONL files or `datasets` names to train on."}
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

    def __post_init__(self):
        for name in ("train_data", "validation_data"):
            if isinstance(getattr(self, name), str):  # one entry in YAML, written without a list
                setattr(self, name, [getattr(self, name)])


@dataclass
class RetroTrainingArguments(TrainingArguments):
    """Trainer's own arguments; reports go nowhere unless asked, and the collator needs every column."""

    report_to: None | str | list[str] = field(
        default="none",
        metadata={"help": "Where to report to, such as tensorboard or wandb. Default: the console only."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator reads columns that the model does not."}
    )


class RetroTrainer(Trainer):
    """Trainer whose evaluation measures loss and bits-per-byte with neighbors on, off and shuffled."""

    def __init__(self, *args, processing_class: PreTrainedTokenizerBase, **kwargs):
        self.bytes_of = byte_lengths(processing_class)
        super().__init__(
            *args,
            processing_class=processing_class,
            compute_metrics=lambda measured: Evaluation(measured.predictions, measured.label_ids).metrics(),
            **kwargs,
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Each sequence's nats in the place of logits, its sizes in that of labels: Trainer gathers both."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            nats, sizes = sequence_nats(model, inputs, self.model.config.chunk_size, self.bytes_of)
        return None, nats, sizes

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        measured = ("bits_per_byte", "gain_over")
        self.model.evaluation = {
            name.removeprefix("eval_"): value
            for name, value in metrics.items()
            if any(part in name for part in measured)
        }
        return metrics

    def create_model_card(self, model_name: str | None = None, **kwargs) -> None:
        """RETRO's own card: base model, knowledge base, evaluation."""
        if self.is_world_process_zero():
            name = self.hub_model_id or model_name or Path(self.args.output_dir).name
            self.model.model_card(name).save(Path(self.args.output_dir) / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer pushes a checkpoint's weights and configuration from output_dir; the code that opens them goes along
        if self.is_world_process_zero():
            write_code(self.model, self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir=None, state_dict=None):
        """Trainer pickles its arguments beside the weights; a checkpoint that is shared must not hold a token."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token


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
            # numbers as text: the parser converts and checks text alone, and YAML reads 5e-4 as text anyway
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
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path} must map names to values, such as 'block_size: 512'; it is a {type(settings).__name__}."
        )
    return settings


def _unknown(where: str, unknown: list[str], known: set[str]) -> str:
    hints = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    listed = ", ".join(f"{name} (did you mean {close[0]}?)" if close else name for name, close in hints.items())
    return f"{where} unknown settings: {listed}"


def _check_arguments(model: ModelArguments, data: DataArguments, training: RetroTrainingArguments) -> None:
    """What can be said to be wrong before anything is loaded."""
    retrieves = data.knowledge_base is not None
    if not data.train_data:
        raise ValueError("train_data is empty: name the files, folders or dataset to train on.")
    if model.model_name_or_path is None and model.tokenizer_name is None:
        raise ValueError("Training from scratch needs tokenizer_name, training from weights needs model_name_or_path.")
    if model.freeze_backbone and not retrieves:
        raise ValueError(
            "freeze_backbone trains only what reads neighbors, and without a knowledge_base there are none: "
            "nothing would be trained. Give a knowledge_base, or leave freeze_backbone out."
        )
    if training.eval_strategy != "no" and not data.validation_data:
        raise ValueError(f"eval_strategy is {training.eval_strategy.value!r}, but validation_data is empty.")
    if training.remove_unused_columns:
        raise ValueError("remove_unused_columns must stay false: the collator reads doc_ids, which the model does not.")
    if retrieves and training.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers is {training.dataloader_num_workers}: a Milvus connection cannot be shared with "
            "worker processes. Set it to 0."
        )
    if retrieves and data.validation_data and training.per_device_eval_batch_size < 2:
        raise ValueError(
            "per_device_eval_batch_size is 1: the shuffled neighbors of a sequence come from another one in its batch. "
            "Set it to 2 or more."
        )


def _checkpoint(training: RetroTrainingArguments) -> str | None:
    """The folder that `resume_from_checkpoint` means: a path, or with `true` the last one in output_dir."""
    asked = training.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    last = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    folder = last if asked.lower() == "true" else asked
    if folder is None:
        raise ValueError(
            f"resume_from_checkpoint is true, but there is no checkpoint in {training.output_dir!r} (output_dir)."
        )
    if not (Path(folder) / "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint: {folder!r} is no checkpoint of a training run (it has no trainer_state.json)."
        )
    return folder


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that `tokenizer_name` says, or else the one beside the weights.

    Raises:
        ValueError: it has no end-of-text token.
    """
    name = arguments.tokenizer_name or arguments.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {name!r} has no end-of-text token (eos_token), which stands between documents."
        )
    return tokenizer


def load_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> RetroForCausalLM:
    """Weights with their configuration overridden, or a model of random weights in the tokenizer's vocabulary.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    overrides = arguments.config_overrides
    if arguments.model_name_or_path is not None:
        model = RetroForCausalLM.from_pretrained(arguments.model_name_or_path, **overrides)
    else:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = RetroForCausalLM(RetroConfig(**{"vocab_size": len(tokenizer), **ids, **overrides}))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {model.config.vocab_size} (vocab_size): "
            "use the tokenizer that the model was made with."
        )
    return model


def connect(model: RetroForCausalLM, tokenizer: BulkTokenizer, data: DataArguments) -> None:
    """Open the knowledge base as the model's retriever, and label the model's configuration with it.

    Only names are written: the address may carry credentials, and a path of an embedding model means nothing elsewhere.

    Raises:
        ValueError: tokenizer, chunk size or embedding model of the knowledge base are not the model's.
    """
    config = model.config
    retriever = data.open_retriever(
        tokenizer,
        num_neighbors=config.num_neighbors,
        neighbor_length=config.neighbor_length,
        cache_size=data.neighbor_cache_size,
    )
    try:
        model.set_retriever(retriever)
    except ValueError:
        retriever.close()
        raise
    config.embedding_model = retriever.embedding_model
    config.collection_name = retriever.collection_name


def choose_parameters(model: RetroForCausalLM, freeze_backbone: bool) -> None:
    """Switch gradients on for what is to be trained, and log how much that is.

    Without a retriever that is the decoder alone: what reads neighbors would get no gradient.
    """
    if freeze_backbone or model.retriever is None:
        model.freeze_backbone()
    if model.retriever is None:
        for parameter in model.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
    total = model.num_parameters()
    trained = model.num_parameters(only_trainable=True)
    logger.info("training %s of %s parameters (%.1f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)


def pack_sources(
    sources: list[str],
    tokenizer: BulkTokenizer,
    config: RetroConfig,
    data: DataArguments,
    cache_dir: str | Path,
) -> Dataset:
    """The documents of all sources as sequences of block_size tokens, in their order."""

    def sequences() -> Iterator[dict]:
        documents = read_all(sources, data.text_field, data.doc_id_field)
        tokenized = ((document.id, ids) for document, ids in tokenize_documents(documents, tokenizer))
        return pack(tokenized, data.block_size or config.n_positions, config.chunk_size, tokenizer.eos_token_id)

    return packed_dataset(sequences, cache_dir)


def build_trainer(
    model_arguments: ModelArguments, data: DataArguments, training: RetroTrainingArguments, cache_dir: str | Path
) -> RetroTrainer:
    """Everything that comes before the first step: model, knowledge base and data, each checked against the others.

    Args:
        cache_dir: where the packed text goes, 4 bytes a token and some; the trainer reads it as it trains.

    Raises:
        ValueError, OSError: something is missing, or does not fit; the message says what.
    """
    set_seed(training.seed)
    tokenizer = load_tokenizer(model_arguments)
    model = load_model(model_arguments, tokenizer)
    n_positions = model.config.n_positions
    if data.block_size is not None and not 2 <= data.block_size <= n_positions:
        raise ValueError(
            f"block_size is {data.block_size}; it must be from 2 to the model's n_positions, {n_positions}."
        )
    bulk_tokenizer = BulkTokenizer(tokenizer)  # takes a while to check itself: made once
    if data.knowledge_base is not None:
        connect(model, bulk_tokenizer, data)
    choose_parameters(model, model_arguments.freeze_backbone)
    train_dataset = pack_sources(data.train_data, bulk_tokenizer, model.config, data, cache_dir)
    eval_dataset = None
    if data.validation_data:
        # shuffled once: neighbors are shuffled between the sequences of a batch, which should not be of one document
        eval_dataset = pack_sources(data.validation_data, bulk_tokenizer, model.config, data, cache_dir).shuffle(seed=0)
    return RetroTrainer(
        model=model,
        args=training,
        data_collator=RetroDataCollator(model.retriever),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of `retro-train`: train, save the model and its tokenizer in output_dir, and evaluate them."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    model_arguments, data, training = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="retro-train-") as cache_dir:
        try:
            trainer = build_trainer(model_arguments, data, training, cache_dir)
        except (KnowledgeBaseError, ValueError, OSError) as error:
            sys.exit(f"train_hf.py: error: {error}")
        try:
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
            trainer.save_model()
            trainer.save_state()
            if trainer.eval_dataset is not None:
                metrics = trainer.evaluate()
                trainer.log_metrics("eval", metrics)
                trainer.save_metrics("eval", metrics)
            if training.push_to_hub:
                trainer.push_to_hub(commit_message="Trained and evaluated")  # writes the card, too
            else:
                trainer.create_model_card()
        finally:
            if trainer.model.retriever is not None:
                trainer.model.retriever.close()


if __name__ == "__main__":
    main()
