"""Assembly of a training run: settings → model, knowledge base and data, each checked against the others → trainer."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from configuration_retro import RetroConfig
from data_retro.collator import RetroDataCollator
from data_retro.mixtures import mix, pack_streams, sample
from data_retro.own_text import warn_of_own_text
from data_retro.packing import PackedStream
from data_retro.precomputed import card_of, load_precomputed, precompute
from modeling_retro import RetroForCausalLM
from modeling_retro.loading import ADDED, RENAMED
from retrieval import BulkTokenizer

from .arguments import DataArguments, ModelArguments, RetroTrainingArguments
from .neighbor_corruption import check_batch_size
from .trainer import RetroTrainer

logger = logging.getLogger(__name__)

DOCUMENTS_SAMPLED = 4  # of each source, before it is packed


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


def load_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[RetroForCausalLM, set[str]]:
    """Weights with their configuration overridden, or a model of random weights in the tokenizer's vocabulary.

    Returns:
        the model, and names of its parameters that no weights were loaded for.

    Raises:
        ValueError: the tokenizer has more tokens than the model; an override is not of its type, or does not go with others.
    """
    overrides = arguments.config_overrides
    try:
        if arguments.model_name_or_path is not None:
            model, loading = RetroForCausalLM.from_pretrained(
                arguments.model_name_or_path, output_loading_info=True, **overrides
            )
            new = set(loading["missing_keys"])
        else:
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            model = RetroForCausalLM(RetroConfig(**{"vocab_size": len(tokenizer), **ids, **overrides}))
            new = {name for name, _ in model.named_parameters()}
    except StrictDataclassError as error:
        raise ValueError(f"config_overrides: {error}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {model.config.vocab_size} (vocab_size): "
            "use the tokenizer that the model was made with."
        )
    return model, new


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


def choose_parameters(
    model: RetroForCausalLM, arguments: ModelArguments, has_neighbors: bool, new: set[str]
) -> torch.nn.Module:
    """Switch gradients on for what is to be trained, and log how much that is; returns the model, or its adapters on it.

    Without neighbors that is the decoder alone: what reads them would get no gradient. Adapters come with those modules of RETRO
    that have `new` parameters: these end in zeros, through which adapters alone would learn nothing.
    """
    if arguments.freeze_backbone or not has_neighbors:
        model.freeze_backbone()
    if not has_neighbors:
        for parameter in model.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
    if arguments.lora is not None:
        modules = [part for part in ADDED if has_neighbors and any(f"{part}." in name for name in new)]
        model = add_adapters(model, {"modules_to_save": modules or None, **arguments.lora})
    total = model.num_parameters()
    trained = model.num_parameters(only_trainable=True)
    logger.info("training %s of %s parameters (%.1f %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)
    return model


def add_adapters(model: RetroForCausalLM, settings: dict[str, Any]) -> torch.nn.Module:
    """The model with LoRA adapters; they are trained, and what `modules_to_save` names.

    Raises:
        ValueError: PEFT is not installed, or knows no such setting.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora needs PEFT: pip install peft.") from error
    try:
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "fan_in_fan_out": True, **settings})
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
) -> tuple[Dataset | PackedStream, Dataset | None]:
    """Sequences to train on and to evaluate on, with their neighbors if they are precomputed.

    Raises:
        ValueError, OSError: something is missing, or does not fit; the message says what.
    """
    block_size = data.block_size or config.n_positions
    if data.precomputed is not None:
        parts, found_with = load_precomputed(data.precomputed, card_of(tokenizer, config, block_size))
        config.embedding_model, config.collection_name = found_with["embedding_model"], found_with["collection_name"]
        return parts["train"], parts.get("validation")
    sizes = (tokenizer, block_size, config.chunk_size)
    if data.streaming:
        streams, rank, processes = data.streams("train_data"), training.process_index, training.world_size
        train = PackedStream(lambda epoch: mix(streams, epoch, rank, processes), *sizes)
    else:
        train = pack_streams(data.streams("train_data"), *sizes, cache_dir)
    if not data.validation_data:
        return train, None
    # shuffled once: neighbors are shuffled between the sequences of a batch, which should not be of one document
    return train, pack_streams(data.streams("validation_data"), *sizes, cache_dir).shuffle(seed=0)


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
    # what can be said to be wrong with the data, the sizes and what is trained comes before the hours of packing
    samples = sample(data.streams("train_data") + data.streams("validation_data"), DOCUMENTS_SAMPLED)
    model, new = load_model(model_arguments, tokenizer)
    config = model.config
    least = config.chunk_size if data.has_neighbors else 2
    if data.block_size is not None and not least <= data.block_size <= config.n_positions:
        raise ValueError(
            f"block_size is {data.block_size}; it must be from {least} ({'a chunk' if data.has_neighbors else 'a prediction'}) to "
            f"the model's n_positions, {config.n_positions}."
        )
    if data.has_neighbors and data.precompute_to is None:
        check_batch_size(training, config)
    bulk_tokenizer = BulkTokenizer(tokenizer)  # takes a while to check itself: made once
    if data.knowledge_base is not None:
        connect(model, bulk_tokenizer, data)
    try:
        trained = choose_parameters(model, model_arguments, data.has_neighbors, new)
        if model.retriever is not None and training.process_index == 0:
            warn_of_own_text(samples, bulk_tokenizer, model.retriever)
        train_dataset, eval_dataset = load_data(data, training, config, bulk_tokenizer, cache_dir)
        return RetroTrainer(
            model=trained,
            args=training,
            data_collator=RetroDataCollator(model.retriever),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            prefetch_batches=data.prefetch_batches,
        )
    except BaseException:
        if model.retriever is not None:
            model.retriever.close()
        raise


def store_neighbors(trainer: RetroTrainer, data: DataArguments) -> None:
    """Store the neighbors of all sequences in the folder `precompute_to`, instead of training."""
    parts = {"train": trainer.train_dataset}
    if trainer.eval_dataset is not None:
        parts["validation"] = trainer.eval_dataset
    config, retriever = trainer.model.config, trainer.model.retriever
    card = card_of(retriever.tokenizer, config, data.block_size or config.n_positions)
    precompute(parts, retriever, card, data.precompute_to)
