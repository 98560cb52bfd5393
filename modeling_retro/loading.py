"""Opening a model: its new parts, its renamed parameters and its retriever."""

import re
from collections import Counter
from contextvars import ContextVar
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from configuration_retro import RetroConfig, decoder_config

from .copy_head import RENAMED_PARAMETERS
from .readers import Reader, open_reader
from .wrapping import OWN_SETTINGS, check_decoder_class, leave_parts_unquantized, open_decoder, wrap_decoder

# a child of the library's logger: whoever silences its load report silences the line that replaces
# it
logger = logging.get_logger("transformers.models.retro")

ADDED = ("cca", "ln_cca", "encoder", "copy_head")  # modules that RETRO adds to a decoder
ENCODER, COPY_HEAD = "neighbor encoder", "copy head"
# regular expression for a name in checkpoints of earlier versions -> present name
RENAMED = {rf"copy_head\.{old}$": f"copy_head.{new}" for old, new in RENAMED_PARAMETERS.items()}


def is_added(name: str) -> bool:
    """Return True for the name of a parameter that RETRO adds to the decoder's."""
    is_decoders = re.search(r"(^|\.)decoder\.", name)  # of a decoder other than GPT-2, whatever it calls its parts
    return not is_decoders and any(f"{module}." in name for module in ADDED)


class NameWithRetriever(str):
    """The name or path of a model, with the retriever that is set on it.

    TRL opens a reference model by the name in the policy's configuration, and the two must read the
    same. The retriever is never written anywhere: JSON, YAML, pickle and `str()` see only the name.
    """

    retriever: Any

    def __new__(cls, name: str, retriever: Any) -> "NameWithRetriever":
        """Return the name, with the retriever attached."""
        named = super().__new__(cls, name)
        named.retriever = retriever
        return named

    def __deepcopy__(self, memo: dict) -> "NameWithRetriever":
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def _represent(dumper: Any, name: NameWithRetriever) -> yaml.Node:
    return dumper.represent_str(str(name))  # YAML's C code takes nothing but `str` itself


for _name in ("Dumper", "SafeDumper", "CDumper", "CSafeDumper"):  # model cards
    if hasattr(yaml, _name):  # YAML may be built without its C code
        getattr(yaml, _name).add_representer(NameWithRetriever, _represent)

# The configuration file of the checkpoint that is being opened. None: it has none, or none is being
# opened.
_CHECKPOINT: ContextVar[dict[str, Any] | None] = ContextVar("_CHECKPOINT", default=None)
# The reader that is put on the model that is being opened.
_READER: ContextVar[Reader | None] = ContextVar("_READER", default=None)
# arguments of `from_pretrained` that the library does not take for settings of the same names
OF_LOADING = {"dtype", "torch_dtype", "quantization_config"}
_LOCATION = (
    *("cache_dir", "force_download", "gguf_file", "local_files_only", "proxies", "revision", "subfolder", "token"),
    "trust_remote_code",
)


class LoadingMixin(PreTrainedModel):
    """`from_pretrained` of RETRO models."""

    _new_parameters: frozenset[str] = frozenset()  # named in one line, and not in the library's load report
    _checkpoint_conversion_mapping = RENAMED  # PEFT applies it to the names in an adapter

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        output_loading_info: bool = False,
        key_mapping: dict[str, str] | None = None,
        reader: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Open a model as `PreTrainedModel.from_pretrained` does. New parts are named in one line.

        The name is that of a RETRO model, of GPT-2, or of any other decoder that
        `AutoModelForCausalLM` opens; RETRO is built around that one. Settings of `RetroConfig` are
        taken as arguments.

        Args:
            reader: a trained reader to put on the decoder: a folder that `save_reader` wrote, the
                name of one on the hub, or "zero-shot" for the one in this package, which fits every
                decoder. Its settings are defaults for the model's.

        Opened by the name in another model's configuration (`config.name_or_path`), a model gets
        that one's retriever, unless it is given a `retriever` of its own, or None. Opened by a
        plain string, it has only what it is given.

        Raises:
            ValueError: RETRO cannot be built on the model; a retriever or a reader does not match
                it.
        """
        name = pretrained_model_name_or_path
        if reader is not None:
            return cls._open_with_reader(name, reader, output_loading_info, kwargs)
        retriever = kwargs.pop("retriever", getattr(name, "retriever", None))
        is_own = retriever is None or not isinstance(name, NameWithRetriever) or retriever is not name.retriever
        key_mapping = RENAMED | (key_mapping or {})
        stored = cls._stored_config(name, kwargs)
        if stored is not None and _is_decoder(stored):
            model, info = cls._build_on_decoder(name, model_args, kwargs, stored)
        else:
            model, info = cls._open(name, model_args, kwargs | {"key_mapping": key_mapping}, stored)
        if model.config.text_config is not None:
            model.base_model.hook_layers()
        if retriever is not None:
            try:
                model.set_retriever(retriever)
            except ValueError as error:
                if is_own:
                    raise
                raise ValueError(
                    f"{error} This retriever is set on the model whose configuration the name is from. Pass "
                    "retriever=None to open the model without it."
                ) from error
        info["missing_keys"] = info["missing_keys"] | model._new_parameters
        return (model, info) if output_loading_info else model

    @classmethod
    def _open_with_reader(cls, name: Any, reader: str | Path, output_loading_info: bool, kwargs: dict[str, Any]) -> Any:
        """Open a decoder and put a reader on it, as `from_pretrained` does."""
        opened = open_reader(reader, kwargs)
        opened.check_fit(RetroConfig.from_pretrained(name, **_location(kwargs)))
        token = _READER.set(opened)
        try:
            model, info = cls.from_pretrained(name, output_loading_info=True, **opened.settings | kwargs)
        finally:
            _READER.reset(token)
        given = opened.put_on(model, model.config)
        info["missing_keys"] = info["missing_keys"] - given
        if absent := {name for name in info["missing_keys"] if is_added(name)}:
            if incomplete := set(map(part_of, absent)) & set(map(part_of, given)):
                raise ValueError(
                    f"The reader {opened.name} lacks {', '.join(sorted(absent))}, so its "
                    f"{_list_parts(set(filter(None, incomplete)))} would be half new. Save or download it again."
                )
            model._announce(absent)
        return (model, info) if output_loading_info else model

    @classmethod
    def _open(cls, name: Any, model_args: tuple, kwargs: dict[str, Any], stored: dict[str, Any] | None) -> Any:
        """Open a RETRO model, or GPT-2 with RETRO's parts; return it and the loading report."""
        if stored is not None and kwargs.get("gguf_file") is not None:  # GPT-2: the library cannot put it into RETRO
            decoder, _ = open_decoder(name, {"gguf_file": kwargs.pop("gguf_file")})
            kwargs["state_dict"], kwargs["config"] = decoder.state_dict(), decoder.config
            name = None
        if isinstance(config := kwargs.get("config"), PreTrainedConfig):
            own = {setting: kwargs.pop(setting) for setting in OWN_SETTINGS & kwargs.keys()}
            kwargs["config"] = _with_settings(config, own, stored)
        text_config = (stored or {}).get("text_config")
        if text_config is not None and kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = deepcopy(kwargs["quantization_config"])
            leave_parts_unquantized(kwargs["quantization_config"], RetroConfig(text_config=text_config))
        token = _CHECKPOINT.set(stored)
        try:
            return super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
        finally:
            _CHECKPOINT.reset(token)

    @classmethod
    def _build_on_decoder(
        cls, name: Any, model_args: tuple, kwargs: dict[str, Any], stored: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Open a decoder other than GPT-2 and build the model around it."""
        config = kwargs.pop("config", None)
        if isinstance(config, str | Path):
            config = RetroConfig.from_pretrained(config)
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config is a {type(config).__name__}. Give a configuration, or the folder of one.")
        changed = {name: kwargs[name] for name in (stored.keys() & kwargs.keys()) - OF_LOADING}
        text_config = decoder_config(stored | changed)
        check_decoder_class(text_config)
        if not cls.can_generate() or model_args:
            raise ValueError(
                f"{cls.__name__} cannot be built on {name}. Use RetroForCausalLM.from_pretrained, and give settings "
                "by name."
            )
        settings = config if isinstance(config, RetroConfig) else None
        if settings is None and config is not None:
            kwargs["config"] = config
        model, info = wrap_decoder(cls, name, settings, kwargs, text_config)
        model._announce({name for name in info["missing_keys"] if is_added(name)})
        return model, info

    @classmethod
    def _stored_config(cls, name: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the checkpoint's own configuration, whatever configuration it is opened with.

        None: there is none.
        """
        if name is None:
            return None
        try:
            return PreTrainedConfig.get_config_dict(name, **_location(kwargs))[0] or None
        except OSError:  # there is no such file; if that is wrong, the library says so
            return None

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Take new parts out of the library's report, and name them in one line.

        A part is new if neither the checkpoint's configuration nor its weights know it. Any other
        missing weight stays in the report: one of the decoder, or one that the checkpoint should
        have.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        checkpoint = _CHECKPOINT.get()
        if checkpoint is None:
            return
        missing = loading_info.missing_keys
        expected = Counter(filter(None, map(part_of, self.state_dict())))
        absent = Counter(filter(None, map(part_of, missing)))
        known = {f"layer {layer}" for layer in checkpoint.get("cca_layers") or ()}
        if known:
            known.add(ENCODER)
        if checkpoint.get("copy_head"):
            known.add(COPY_HEAD)
        new = {part for part, number in absent.items() if number == expected[part]} - known
        if not new:
            return
        loading_info.missing_keys = missing - self._announce({name for name in missing if part_of(name) in new})

    def _announce(self, names: set[str]) -> set[str]:
        """Name new parts in one line; return the names of their parameters."""
        if _READER.get() is not None:
            return names  # they come from the reader
        self._new_parameters = frozenset(names)
        size = sum(self.get_parameter(name).numel() for name in names)
        parts = set(filter(None, map(part_of, names)))
        logger.warning("New, and a no-op until trained: %s (%s parameters).", _list_parts(parts), f"{size:,}")
        return names


def _location(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where a configuration is stored."""
    return {argument: kwargs[argument] for argument in _LOCATION if argument in kwargs}


def _is_decoder(stored: dict[str, Any]) -> bool:
    """Return True for the configuration of a decoder that is neither RETRO nor GPT-2."""
    return stored.get("model_type", RetroConfig.model_type) not in (RetroConfig.model_type, "gpt2")


def _with_settings(
    config: PreTrainedConfig, settings: dict[str, Any], stored: dict[str, Any] | None
) -> PreTrainedConfig:
    """Return the configuration that a model is opened with, after changing some settings.

    Raises:
        ValueError: it is of another kind of model than the checkpoint.
    """
    known = {RetroConfig.model_type, (stored or {}).get("model_type", RetroConfig.model_type)}
    if config.model_type not in known:
        raise ValueError(f"config is a {type(config).__name__}, but the model is a RETRO. Give a RetroConfig.")
    if not settings and config.model_type == RetroConfig.model_type:
        return config
    values = {**config.to_dict(), "model_type": RetroConfig.model_type}
    return RetroConfig.from_dict(values, **settings, attn_implementation=config._attn_implementation)


def part_of(name: str) -> str | None:
    """Return the part of a RETRO model that a parameter belongs to; None for the decoder.

    The cross-attention of a decoder layer is "layer 5".
    """
    if not is_added(name):
        return None
    if layer := re.search(r"\b(?:h|cross_attention)\.(\d+)\.", name):
        return f"layer {layer[1]}"
    return COPY_HEAD if "copy_head." in name else ENCODER


def _list_parts(parts: set[str]) -> str:
    """Return the names of parts as one phrase."""
    layers = sorted(int(part.removeprefix("layer ")) for part in parts if part.startswith("layer "))
    names = [ENCODER] * (ENCODER in parts)
    if layers:
        names.append(f"cross-attention in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}")
    return ", ".join(names + [COPY_HEAD] * (COPY_HEAD in parts))
