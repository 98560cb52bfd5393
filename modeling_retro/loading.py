"""Opening a model: which of its parts are new, and what a second model opened by the name of a first one reads."""

import re
from collections import Counter
from contextvars import ContextVar
from typing import Any

import yaml
from transformers.utils import logging

# a child of the library's logger, so that what silences its load report silences the line that takes its place
logger = logging.get_logger("transformers.models.retro")

ADDED = ("cca", "ln_cca", "encoder", "copy_head")  # modules that RETRO adds to GPT-2


def is_added(name: str) -> bool:
    """Return True for the name of a parameter that RETRO adds to GPT-2's."""
    return any(f"{module}." in name for module in ADDED)


class NameWithRetriever(str):
    """The name or path of a model whose retriever is set: a string, and the retriever.

    TRL opens a reference model by the name in the policy's configuration, and the two must read the same. The retriever is
    never written anywhere: JSON, YAML, pickle and `str()` see the name alone.
    """

    retriever: Any

    def __new__(cls, name: str, retriever: Any) -> "NameWithRetriever":
        named = super().__new__(cls, name)
        named.retriever = retriever
        return named

    def __deepcopy__(self, memo: dict) -> "NameWithRetriever":
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def _represent(dumper: Any, name: NameWithRetriever) -> yaml.Node:
    return dumper.represent_str(str(name))  # those in C take nothing but `str` itself


for _name in ("Dumper", "SafeDumper", "CDumper", "CSafeDumper"):  # model cards
    if hasattr(yaml, _name):  # those in C may be left out
        getattr(yaml, _name).add_representer(NameWithRetriever, _represent)

# The configuration file of the checkpoint that is being opened; None: it has none, or nobody opens one.
_CHECKPOINT: ContextVar[dict[str, Any] | None] = ContextVar("_CHECKPOINT", default=None)
_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class LoadingMixin:
    """`from_pretrained` of RETRO models."""

    _new_parameters: frozenset[str] = frozenset()  # named in one line, and not in the library's load report

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """`PreTrainedModel.from_pretrained`. Parts that are new are named in one line.

        Opened by the name in another model's configuration (`config.name_or_path`), a model reads what that one reads, unless
        it is given a `retriever` of its own, or None. Opened by a plain string, it reads only what it is given.
        """
        token = _CHECKPOINT.set(cls._checkpoint_config(pretrained_model_name_or_path, kwargs))
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        finally:
            _CHECKPOINT.reset(token)
        if isinstance(pretrained_model_name_or_path, NameWithRetriever) and "retriever" not in kwargs:
            try:
                model.set_retriever(pretrained_model_name_or_path.retriever)
            except ValueError as error:
                raise ValueError(
                    f"{error} This retriever is that of the model whose configuration the name is from: pass retriever=None to "
                    "open the model without it."
                ) from error
        info["missing_keys"] = info["missing_keys"] | model._new_parameters
        return (model, info) if output_loading_info else model

    @classmethod
    def _checkpoint_config(cls, name: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a checkpoint's own configuration file says, whatever configuration it is opened with."""
        if name is None:
            return None
        place = {argument: kwargs[argument] for argument in _PLACE if argument in kwargs}
        try:
            return cls.config_class.get_config_dict(name, **place)[0]
        except OSError:  # there is no such file; if that is wrong, the library says so
            return None

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """Take new parts out of the library's report, and name them in one line.

        A part is new if neither the checkpoint's configuration nor its weights know it. Whatever else is missing stays in the
        report: a weight of the decoder, or one that the checkpoint should have.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        checkpoint = _CHECKPOINT.get()
        if checkpoint is None:
            return
        missing = loading_info.missing_keys
        expected = Counter(filter(None, map(_part_of, self.state_dict())))
        absent = Counter(filter(None, map(_part_of, missing)))
        known = {f"layer {layer}" for layer in checkpoint.get("cca_layers") or ()}
        if known:
            known.add(ENCODER)
        if checkpoint.get("copy_head"):
            known.add(COPY_HEAD)
        new = {part for part, number in absent.items() if number == expected[part]} - known
        if not new:
            return
        self._new_parameters = frozenset(name for name in missing if _part_of(name) in new)
        loading_info.missing_keys = missing - self._new_parameters
        size = sum(self.get_parameter(name).numel() for name in self._new_parameters)
        layers = sorted(int(part.removeprefix("layer ")) for part in new if part.startswith("layer "))
        parts = [ENCODER] * (ENCODER in new)
        if layers:
            parts.append(f"cross-attention in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}")
        parts += [COPY_HEAD] * (COPY_HEAD in new)
        logger.warning("New, and a no-op until trained: %s (%s parameters).", ", ".join(parts), f"{size:,}")


ENCODER, COPY_HEAD = "neighbor encoder", "copy head"


def _part_of(name: str) -> str | None:
    """The part of a RETRO model that a parameter belongs to: "layer 5" for its cross-attention; None: the decoder."""
    if not is_added(name):
        return None
    if layer := re.search(r"\bh\.(\d+)\.", name):
        return f"layer {layer[1]}"
    return COPY_HEAD if "copy_head." in name else ENCODER
