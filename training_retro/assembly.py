"""Assembly of a training run: settings → model, knowledge base and data → trainer."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase, set_seed

from configuration_retro import RetroConfig
from data_retro.collator import RetroDataCollator
from data_retro.first_points import FirstPoints
from data_retro.mixtures import mix, pack_streams, sample
from data_retro.own_text import warn_of_own_text
from data_retro.packing import PackedStream
from data_retro.precomputed import load_precomputed, requirements_of
from evaluation_retro.opening import parts_to_open
from modeling_retro import RetroForCausalLM
from modeling_retro.loading import ADDED, RENAMED
from modeling_retro.neighbor_fetching import warn_of_another_search
from modeling_retro.vocabulary import suppress_padding_ids
from retrieval import BulkTokenizer, MilvusRetriever
from retrieval.parsing import as_mapping
from retrieval.tokenizer_loading import load_tokenizer

from .neighbor_corruption import check_batch_size
from .parameters import parameter_table
from .settings import DataArguments, ModelArguments, RetroTrainingArguments
from .trainer import RetroTrainer

logger = logging.getLogger(__name__)

DOCUMENTS_SAMPLED = 4  # per source, to find errors before hours of packing


def build_trainer(
    model_arguments: ModelArguments, data: DataArguments, training: RetroTrainingArguments, cache_dir: str | Path
) -> RetroTrainer:
    """Load the model, open the knowledge base, pack the data, and return the trainer.

    Errors in the data, the sizes and the trained parameters are found before the text is packed.

    Args:
        model_arguments, data, training: the settings.
        cache_dir: folder of the packed text, which takes a little more than 4 bytes per token. The
            trainer reads it during training.

    Raises:
        ValueError, OSError: something is missing, or does not fit. The message says what.
    """
    set_seed(training.seed)
    tokenizer = tokenizer_of(model_arguments)
    read = ["validation_data"] if training.eval_only else ["train_data", "validation_data"]
    samples = sample([stream for part in read for stream in data.streams(part)], DOCUMENTS_SAMPLED)
    model, new = load_model(model_arguments, tokenizer)
    bulk_tokenizer = BulkTokenizer(tokenizer)  # made once: it takes a while to check itself
    check_against_model(model.config, bulk_tokenizer, data, training)
    retriever = None if data.knowledge_base is None else connect(model, bulk_tokenizer, data)
    try:
        trained: torch.nn.Module = model
        if not training.eval_only:
            trained = choose_parameters(model, model_arguments, data.has_neighbors, new)
            if training.process_index == 0:
                logger.info("\n%s", parameter_table(trained))
        if retriever is not None and training.process_index == 0:
            warn_of_own_text(samples, bulk_tokenizer, retriever)
        train_dataset, eval_dataset = load_data(data, training, model.config, bulk_tokenizer, cache_dir)
        return RetroTrainer(
            model=trained,
            args=training,
            data_collator=RetroDataCollator(retriever, model.config.retrieval_stride),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            prefetch_batches=data.prefetch_batches,
        )
    except BaseException:
        if retriever is not None:
            retriever.close()
        raise


def tokenizer_of(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `tokenizer_name` names, or the one beside the weights.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    name = arguments.tokenizer_name or arguments.model_name_or_path
    assert name is not None, "ModelArguments checks it"
    tokenizer = load_tokenizer(name, None if arguments.tokenizer_name else arguments.gguf_file)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {name!r} has no end-of-text token (eos_token), which separates documents. Set one."
        )
    return tokenizer


def load_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[RetroForCausalLM, set[str]]:
    """Load weights with a changed configuration, or make a model with random weights.

    Returns:
        the model, and the names of its parameters that no weights were loaded for.

    Raises:
        ValueError: a changed setting has a wrong type, or does not go with the others.
    """
    overrides = as_mapping("config_overrides", arguments.config_overrides) or {}
    try:
        if arguments.model_name_or_path is not None:
            parts = parts_to_open(arguments.gguf_file, arguments.reader)
            model, loading = RetroForCausalLM.from_pretrained(
                arguments.model_name_or_path, output_loading_info=True, **parts, **overrides
            )
            new = set(loading["missing_keys"])
        else:
            model = RetroForCausalLM(new_config(tokenizer, overrides))
            new = {name for name, _ in model.named_parameters()}
    except StrictDataclassError as error:
        raise ValueError(f"config_overrides: {error}") from error
    suppress_padding_ids(model, tokenizer)
    return model, new


def new_config(tokenizer: PreTrainedTokenizerBase, overrides: dict[str, Any]) -> RetroConfig:
    """Return the configuration of a model with random weights, with the tokenizer's vocabulary.

    With `text_config` among the overrides, its decoder gets the vocabulary.
    """
    vocabulary = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if (decoder := overrides.get("text_config")) is not None:
        return RetroConfig(**overrides | {"text_config": {**vocabulary, **decoder}})
    return RetroConfig(**{**vocabulary, **overrides})


def check_against_model(
    config: RetroConfig, tokenizer: BulkTokenizer, data: DataArguments, training: RetroTrainingArguments
) -> None:
    """Check the tokenizer and the settings against the model.

    Raises:
        ValueError: a text may have tokens that the model lacks, block_size is out of its range, or
            shuffled neighbors are to be read in batches of one sequence.
    """
    # special tokens that no text has, such as those of images, may be more than the model has
    needed = max(tokenizer.vocab_size, 1 + (tokenizer.eos_token_id or 0), 1 + (tokenizer.bos_token_id or 0))
    if needed > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {needed} tokens, the model's vocabulary {config.vocab_size} (vocab_size). Use "
            "the tokenizer that the model was made with."
        )
    least, what = (config.chunk_size, "a chunk") if data.has_neighbors else (2, "a prediction")
    if data.block_size is not None and not least <= data.block_size <= config.n_positions:
        raise ValueError(
            f"block_size is {data.block_size}; it must be from {least} ({what}) to the model's n_positions, "
            f"{config.n_positions}."
        )
    if data.has_neighbors and data.precompute_to is None and not training.eval_only:
        check_batch_size(training, config)


def connect(model: RetroForCausalLM, tokenizer: BulkTokenizer, data: DataArguments) -> MilvusRetriever:
    """Open the knowledge base as the model's retriever, and name it in the model's configuration.

    Only names are written: an address may carry credentials, and a path means nothing elsewhere.

    Raises:
        ValueError: the knowledge base has another tokenizer, chunk size or embedding model than the
            model.
    """
    config = model.config
    assert config.num_neighbors is not None, "set when the configuration is built"
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
    config.search = retriever.search
    return retriever


def choose_parameters(
    model: RetroForCausalLM, arguments: ModelArguments, has_neighbors: bool, new: set[str]
) -> torch.nn.Module:
    """Choose the parameters that are trained.

    Without neighbors these are the decoder's: what reads neighbors would get no gradient. With
    adapters, those parts of RETRO that have `new` parameters are trained whole: they end in zeros,
    through which adapters alone would learn nothing.

    Args:
        model: the model.
        arguments: the settings.
        has_neighbors: whether the model reads neighbors in training.
        new: names of the parameters that no weights were loaded for.

    Returns:
        the model, or a PEFT model around it.
    """
    if freezes_backbone(arguments, model.config) or not has_neighbors:
        model.freeze_backbone()
    if not has_neighbors:
        for parameter in model.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
    trained: Any = model
    if (adapters := as_mapping("lora", arguments.lora)) is not None:
        modules = [part for part in ADDED if has_neighbors and any(f"{part}." in name for name in new)]
        trained = add_adapters(model, {"modules_to_save": modules or None, **adapters})
    return trained


def freezes_backbone(arguments: ModelArguments, config: RetroConfig) -> bool:
    """Return the setting `freeze_backbone`, or its default for this model.

    Pretrained decoders other than GPT-2 are frozen, unless adapters are to change them.
    """
    if arguments.freeze_backbone is not None:
        return arguments.freeze_backbone
    is_pretrained = arguments.model_name_or_path is not None
    return is_pretrained and config.text_config is not None and arguments.lora is None


def add_adapters(model: RetroForCausalLM, settings: dict[str, Any]) -> torch.nn.Module:
    """Return the model with LoRA adapters. They are trained, and the parts in `modules_to_save`.

    Raises:
        ValueError: PEFT is not installed, or has no such setting.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora needs PEFT, which is not installed: pip install peft.") from error
    try:
        # GPT-2's matrices lie the other way round
        turned = model.config.text_config is None
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "fan_in_fan_out": turned, **settings})
    except TypeError as error:
        raise ValueError(f"lora: {error}. Its settings are those of peft.LoraConfig.") from error
    adapted = get_peft_model(model, config)
    # Trainer resumes by `load_adapter`, which does not look up the names of renamed parameters
    adapted.load_adapter = partial(adapted.load_adapter, key_mapping=RENAMED)  # type: ignore[method-assign]
    return adapted


def load_data(
    data: DataArguments,
    training: RetroTrainingArguments,
    config: RetroConfig,
    tokenizer: BulkTokenizer,
    cache_dir: str | Path,
) -> tuple[Dataset | PackedStream | None, Dataset | None]:
    """Return the sequences to train on and to evaluate on, with neighbors if precomputed.

    With `eval_only` there are none to train on.

    Raises:
        ValueError, OSError: something is missing, or does not fit. The message says what.
    """
    block_size = data.sequence_length(config)
    first_points = data.first_points(config, training.seed)
    if data.precomputed is not None:
        requirements = requirements_of(tokenizer, config, block_size, first_points)
        if data.random_first_point is None:
            del requirements["first_point_seed"]
        parts, found_with = load_precomputed(data.precomputed, requirements)
        config.embedding_model, config.collection_name = found_with["embedding_model"], found_with["collection_name"]
        search = found_with.get("search", "dense")
        warn_of_another_search(config, search)
        config.search = search
        if training.eval_only and "validation" not in parts:
            raise ValueError(
                f"eval_only needs a validation part, which {data.precomputed} does not have. Precompute again with "
                "validation_data."
            )
        return None if training.eval_only else parts["train"], parts.get("validation")
    sizes = tokenizer, block_size, config.chunk_size
    train = None if training.eval_only else _training_sequences(data, training, sizes, cache_dir, first_points)
    if not data.validation_data:
        return train, None
    # On the paper's grid, so that runs compare. Shuffled once: an evaluation swaps neighbors
    # between the sequences of a batch, which should not come from one document.
    return train, pack_streams(data.streams("validation_data"), *sizes, cache_dir).shuffle(seed=0)


def _training_sequences(
    data: DataArguments,
    training: RetroTrainingArguments,
    sizes: tuple[BulkTokenizer, int, int],
    cache_dir: str | Path,
    first_points: FirstPoints | None,
) -> Dataset | PackedStream:
    """Return the sequences to train on, packed now or, with `streaming`, while they are read."""
    streams, rank, processes = data.streams("train_data"), training.process_index, training.world_size
    if data.streaming:
        return PackedStream(lambda epoch: mix(streams, epoch, rank, processes), *sizes, first_points)
    return pack_streams(streams, *sizes, cache_dir, first_points)
