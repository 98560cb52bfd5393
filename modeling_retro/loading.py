"""Opening a model: its new parts, its renamed parameters and its retriever."""

import re
from collections import Counter
from contextvars import ContextVar
from typing import Any

import yaml
from transformers import PreTrainedModel
from transformers.utils import logging

from .copy_head import RENAMED_PARAMETERS

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
_LOCATION = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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
        **kwargs: Any,
    ) -> Any:
        """Open a model as `PreTrainedModel.from_pretrained` does. New parts are named in one line.

        Opened by the name in another model's configuration (`config.name_or_path`), a model gets
        that one's retriever, unless it is given a `retriever` of its own, or None. Opened by a
        plain string, it has only what it is given.
        """
        token = _CHECKPOINT.set(cls._checkpoint_config(pretrained_model_name_or_path, kwargs))
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                key_mapping=RENAMED | (key_mapping or {}),
                **kwargs,
            )
        finally:
            _CHECKPOINT.reset(token)
        model, info = loaded
        if isinstance(pretrained_model_name_or_path, NameWithRetriever) and "retriever" not in kwargs:
            try:
                model.set_retriever(pretrained_model_name_or_path.retriever)
            except ValueError as error:
                raise ValueError(
                    f"{error} This retriever is set on the model whose configuration the name is from. Pass "
                    "retriever=None to open the model without it."
                ) from error
        info["missing_keys"] = info["missing_keys"] | model._new_parameters
        return (model, info) if output_loading_info else model

    @classmethod
    def _checkpoint_config(cls, name: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the checkpoint's own configuration, whatever configuration it is opened with."""
        if name is None:
            return None
        location = {argument: kwargs[argument] for argument in _LOCATION if argument in kwargs}
        assert cls.config_class is not None
        try:
            return cls.config_class.get_config_dict(name, **location)[0]
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
        self._new_parameters = frozenset(name for name in missing if part_of(name) in new)
        loading_info.missing_keys = missing - self._new_parameters
        size = sum(self.get_parameter(name).numel() for name in self._new_parameters)
        logger.warning("New, and a no-op until trained: %s (%s parameters).", _list_parts(new), f"{size:,}")


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
