"""Open a model, its tokenizer and its knowledge base from the settings that name them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from modeling_retro import RetroForCausalLM
from modeling_retro.loading import is_added
from modeling_retro.vocabulary import suppress_padding_ids
from retrieval import BulkTokenizer, MilvusRetriever
from retrieval.arguments import KnowledgeBaseArguments
from retrieval.tokenizer_loading import load_tokenizer

NUMBERS_HASHED = 256  # of each parameter
# parts of a configuration that change no number: names, places and versions
NAMES = ("_name_or_path", "architectures", "auto_map", "base_model", "collection_name", "embedding_model")


@dataclass
class ModelSettings(KnowledgeBaseArguments):
    """The model, its tokenizer and knowledge base; fields for `HfArgumentParser`, to inherit."""

    model: str = field(
        kw_only=True,
        metadata={"help": "RETRO's weights, or any decoder's, with their tokenizer: a Hub name or a folder."},
    )
    gguf_file: str | None = field(
        default=None,
        metadata={"help": "Name of a GGUF file beside the model. It holds the decoder and its tokenizer."},
    )
    reader: str | None = field(
        default=None,
        metadata={
            "help": "RETRO's own weights, saved without their decoder: a Hub name or a folder. They are put on the "
            "model."
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "Device such as cpu or cuda:1. By default a GPU if there is one."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Number format of the weights. auto: as they were saved."}
    )

    @property
    def name(self) -> str:
        """The model's name in messages and reports."""
        parts = (self.model, self.gguf_file, self.reader and f"reader {self.reader}")
        return ", ".join(part for part in parts if part)


@dataclass
class Opened:
    """A model that is ready to be measured.

    Attributes:
        model: in evaluation mode, on its device, with the retriever if there is one.
        tokenizer: the model's.
        retriever: the knowledge base, or None.
    """

    model: RetroForCausalLM
    tokenizer: BulkTokenizer
    retriever: MilvusRetriever | None

    def describe(self) -> dict[str, Any]:
        """Return what a measurement belongs to: the model, and its knowledge base if any."""
        described: dict[str, Any] = {
            "weights": fingerprint(self.model),
            "configuration": config_fingerprint(self.model.config),
            "dtype": str(self.model.dtype),
        }
        return described | ({} if self.retriever is None else describe_retriever(self.retriever))

    def close(self) -> None:
        """Release the knowledge base."""
        if self.retriever is not None:
            self.retriever.close()


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of a model's weights: of the first numbers of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        numbers = parameter.detach().flatten()[:NUMBERS_HASHED].float().cpu().numpy()
        digest.update(name.encode() + numbers.tobytes())
    return digest.hexdigest()[:16]


def config_fingerprint(config: PreTrainedConfig) -> str:
    """Return a hash of a configuration, but for names, places and versions."""
    settings = config.to_dict()
    for part in (settings, settings.get("text_config") or {}):
        for name in (*NAMES, "transformers_version"):
            part.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def describe_retriever(retriever: MilvusRetriever) -> dict[str, Any]:
    """Return what decides which neighbors are found: the knowledge base, and how it is searched.

    The embedding model and its prompts are the collection's own, or it would not have been opened.
    """
    store, reranker = retriever.store, retriever.reranker
    return {
        "collection": retriever.collection_name,
        "chunks": store.count(),
        "revision": store.revision(),
        "search": retriever.search,
        "neighbors": retriever.num_neighbors,
        "reranker": None if reranker is None else [reranker.label, retriever._rows_wanted],
    }


def parts_to_open(gguf_file: str | None, reader: str | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a GGUF file and a reader; none that is None."""
    given = {"gguf_file": gguf_file, "reader": reader}
    return {name: value for name, value in given.items() if value is not None}


def open_model(
    settings: ModelSettings,
    num_neighbors: int | None = None,
    needs_neighbors: bool = True,
    config: Mapping[str, Any] | None = None,
    builds_its_own: bool = False,
) -> Opened:
    """Load the model onto its device, with the knowledge base as its retriever if there is one.

    Args:
        settings: names the model and the knowledge base.
        num_neighbors: neighbors that the retriever finds for each chunk. Default: the model's.
        needs_neighbors: refuse to open without a knowledge base, or with a model that cannot read.
        config: settings of `RetroConfig` that are changed.
        builds_its_own: the caller builds the knowledge base; none need be named.

    Raises:
        ValueError: there is no knowledge base or no such device, the model has no weights that read
            neighbors, or the knowledge base is another model's.
        KnowledgeBaseError: the knowledge base cannot be opened, or does not fit the tokenizer.
        OSError: there is no such model.
    """
    if needs_neighbors and settings.knowledge_base is None and not builds_its_own:
        raise ValueError(
            "knowledge_base is not given, so there are no neighbors to measure. Name a Milvus Lite file or a server."
        )
    device = find_device(settings.device)
    hf_tokenizer = load_tokenizer(settings.model, settings.gguf_file)
    parts = parts_to_open(settings.gguf_file, settings.reader)
    model, loading = RetroForCausalLM.from_pretrained(
        settings.model, dtype=settings.dtype, output_loading_info=True, **parts, **config or {}
    )
    if needs_neighbors:
        check_reads(model, set(loading["missing_keys"]), settings.name)
    model = model.eval().to(device)
    suppress_padding_ids(model, hf_tokenizer)
    tokenizer = BulkTokenizer(hf_tokenizer)
    if settings.knowledge_base is None:
        return Opened(model, tokenizer, None)
    retriever = settings.open_retriever(
        tokenizer,
        collection_name=model.config.collection_name,
        num_neighbors=num_neighbors or model.config.num_neighbors,
        neighbor_length=model.config.neighbor_length,
    )
    try:
        model.set_retriever(retriever)
    except ValueError:
        retriever.close()
        raise
    return Opened(model, tokenizer, retriever)


def find_device(name: str | None) -> torch.device:
    """Return a device by name. Default: a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"device is {name!r}: {reason}. Give cpu, or the name of a GPU that is there.") from error
    return device


def check_reads(model: RetroForCausalLM, new: set[str], name: str) -> None:
    """Check that weights were loaded for what reads neighbors.

    Args:
        model: the model.
        new: names of the parameters that no weights were loaded for.
        name: the model's, for the message.

    Raises:
        ValueError: none were loaded, so that neighbors would change nothing.
    """
    added = {parameter for parameter, _ in model.named_parameters() if is_added(parameter)}
    if added <= new:
        raise ValueError(
            f"{name} has no weights that read neighbors, so they would change nothing. Name a trained RETRO, or put a "
            "reader on the decoder: --reader FOLDER, or --reader zero-shot."
        )


def plain_decoder(model: RetroForCausalLM) -> PreTrainedModel:
    """Return the decoder alone, as an ordinary model of transformers that shares its weights.

    Rivals of RETRO are given this one: nothing of RETRO takes part in what it computes.
    """
    if model.config.text_config is not None:
        return model.transformer.get_submodule("decoder")  # type: ignore[return-value]
    settings = {name: value for name, value in model.config.to_dict().items() if name in GPT2Config().to_dict()}
    settings["model_type"] = GPT2Config.model_type
    with torch.device("meta"):
        decoder = GPT2LMHeadModel(GPT2Config(**settings))
    own = {name: value for name, value in model.state_dict().items() if not is_added(name)}
    decoder.load_state_dict(own, strict=False, assign=True)
    decoder.tie_weights()
    return decoder.eval()
