"""Embedding: text to unit-length vectors with any sentence-transformers model."""

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from .errors import KnowledgeBaseError
from .labels import short_name
from .openvino_encoder import run_with_openvino

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

DEFAULT_EMBEDDING_MODEL = "sentence-transformers/all-mpnet-base-v2"
BATCH_SIZE = 32  # texts that go through the model together, unless another number is given
UNPADDED_BATCH_SIZE = 256  # the least where a long text does not make others of its batch slower
PROBE_SENTENCE = "The quick brown fox jumps over the lazy dog; 3 foxes, 14 dogs, def fox(dog): return not lazy."
PROBE_LENGTH = 32

Backend = Literal["torch", "openvino"]
BACKENDS = get_args(Backend)
# Names under which models ship a prompt; the first one that is there and not empty counts
SHIPPED_PROMPTS = {"query_prompt": ("query",), "document_prompt": ("document", "passage", "corpus")}


@dataclass
class EmbedderSettings:
    """The settings of an embedding model, declared once for library, YAML and command line.

    The prompts and truncate_dim change vectors. They are part of a collection's identity, and one
    that is None takes the collection's value.

    Raises:
        ValueError: there is no such backend, or truncate_dim is below 1.
    """

    query_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Text that the embedding model reads before a text to search for. '' for none. By default the "
            "collection's, which for a new one is the model's own."
        },
    )
    document_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Text that the embedding model reads before a chunk of a document. '' for none. By default the "
            "collection's, which for a new one is the model's own."
        },
    )
    truncate_dim: int | None = field(
        default=None,
        metadata={
            "help": "Keep this many first components of each embedding, for models trained for it (Matryoshka). By "
            "default the collection's number, which for a new one is all."
        },
    )
    backend: Backend = field(
        default="torch",
        metadata={
            "help": "What runs the embedding model: torch, or openvino, which is faster on CPUs and needs the extra of "
            "that name."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that comes with the embedding model or the reranker. It can do anything."},
    )

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}.")
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise ValueError(f"truncate_dim is {self.truncate_dim}; it must be 1 or more.")

    @classmethod
    def of(cls, options: object) -> "EmbedderSettings":
        """Take the settings from an object that has them among other attributes."""
        return cls(**{declared.name: getattr(options, declared.name) for declared in dataclasses.fields(cls)})

    def given(self) -> list[str]:
        """Return the names of the settings of an embedding model that are not at their default."""
        plain = EmbedderSettings(trust_remote_code=self.trust_remote_code)  # which a reranker has, too
        names = [declared.name for declared in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(plain, name)]


class Embedder:
    """A sentence-transformers model that gives unit-length float32 vectors.

    Copying returns the same object. A pickle holds no weights: they are loaded again on first use,
    from the same place.

    Args:
        model: name on the hub, or a folder.
        settings: prompts, truncation, backend and trust in remote code. A prompt that is None is
            the model's own, or none if it has none.
        device: the model's device, such as "cpu" or "cuda:1"; None takes the best available.
        dtype: the weights' type, such as `torch.bfloat16`; None keeps the model's own.
        batch_size: texts in one forward pass.

    Raises:
        KnowledgeBaseError: the backend's packages are missing.
        OSError: the model does not exist or cannot be reached.
        ValueError: the device does not exist, truncate_dim exceeds the model's dimension, a dtype
            is given for a backend other than torch, or a device other than the CPU for openvino.
    """

    def __init__(
        self,
        model: str = DEFAULT_EMBEDDING_MODEL,
        *,
        settings: EmbedderSettings | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.label = short_name(model)
        self.settings = settings or EmbedderSettings()
        self.batch_size = batch_size
        self._source = os.path.abspath(model) if os.path.isdir(model) else str(model)
        self._device = None if device is None else str(device)
        self._dtype = dtype
        self._warned: set[str] = set()
        if dtype is not None and self.settings.backend != "torch":
            raise ValueError(f"dtype is for the torch backend, not for {self.settings.backend}. Leave it out.")
        if self.settings.backend == "openvino" and self._device not in (None, "cpu"):
            raise ValueError(f"The openvino backend runs on the CPU, not on {self._device!r}. Leave the device out.")
        self.model  # noqa: B018  load now, so that a wrong name fails here
        truncated = self.settings.truncate_dim
        if truncated is not None and truncated > self.dimension:
            raise ValueError(
                f"truncate_dim is {truncated}, but {self.label} gives {self.dimension} components. Set it lower."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("model", "_probe_vector")}

    def __copy__(self) -> "Embedder":
        return self

    def __deepcopy__(self, memo: dict) -> "Embedder":
        return self

    def for_collection(self, recorded: Mapping[str, Any]) -> "Embedder":
        """Return an embedder of the same model, with a collection's settings where none are given.

        Args:
            recorded: the `vector_settings` that the collection was made with.
        """
        plain = {"query_prompt": self._default_prompt, "document_prompt": self._default_prompt, "truncate_dim": None}
        missing = {
            name: recorded.get(name, value) for name, value in plain.items() if getattr(self.settings, name) is None
        }
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.settings = dataclasses.replace(self.settings, **missing)
        return other

    @cached_property
    def model(self) -> "SentenceTransformer":
        """The underlying `SentenceTransformer`, loaded on first use."""
        # Imported lazily: it takes seconds.
        from sentence_transformers import SentenceTransformer

        openvino = self.settings.backend == "openvino"
        if openvino:
            check_openvino()
        if self._device is not None:
            _check_device(self._device)
        try:
            model = SentenceTransformer(
                self._source,
                device="cpu" if openvino else self._device,
                trust_remote_code=self.settings.trust_remote_code,
                model_kwargs={} if self._dtype is None else {"dtype": self._dtype},
            )
            if openvino:
                run_with_openvino(model)
            return model
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = str(error).rstrip(".")
            raise OSError(
                f"Cannot load the embedding model {self._source!r}: {reason}. Give the name of a sentence-transformers "
                "model on the hub, or the folder of one."
            ) from error

    @property
    def _default_prompt(self) -> str:
        """The prompt that the model reads before any text if none is named, '' for most models."""
        return self._shipped_prompt(self.model.default_prompt_name or "")

    def _shipped_prompt(self, *names: str) -> str:
        """Return the first prompt of these names that the model ships and that is not empty."""
        return next((text for name in names if (text := self.model.prompts.get(name))), "")

    def _prompt(self, name: str) -> str:
        """Return the `query_prompt` or the `document_prompt` that is in effect."""
        given = getattr(self.settings, name)
        if given is not None:
            return given
        shipped = {kind: self._shipped_prompt(*names) for kind, names in SHIPPED_PROMPTS.items()}
        return shipped[name] if any(shipped.values()) else self._default_prompt

    @property
    def vector_settings(self) -> dict[str, Any]:
        """The settings in effect that change vectors, as a collection records them.

        Those without effect are left out. So most models have none.
        """
        prompts = {name: self._prompt(name) for name in SHIPPED_PROMPTS}
        settings: dict[str, Any] = {name: text for name, text in prompts.items() if text != self._default_prompt}
        if self.dimension < len(self._probe_vector):
            settings["truncate_dim"] = self.dimension
        return settings

    @cached_property
    def _probe_vector(self) -> np.ndarray:
        return self._encode([PROBE_SENTENCE], prompt=self._default_prompt, truncate_dim=None)[0]

    @property
    def dimension(self) -> int:
        """The number of components of a vector."""
        whole = len(self._probe_vector)
        return min(whole, self.settings.truncate_dim or whole)

    @property
    def probe(self) -> list[float]:
        """The first numbers of a fixed sentence's embedding: they identify the model.

        It is embedded without a query or document prompt.
        """
        return [round(float(value), 6) for value in self._probe_vector[: min(PROBE_LENGTH, self.dimension)]]

    def encode(self, texts: Sequence[str], *, is_query: bool = False) -> np.ndarray:
        """Embed texts. The model sorts them by length itself.

        A text longer than the model's window is cut by the model. The first such query and the
        first such document are reported by a warning.

        Args:
            is_query: the texts are searched for and get the query prompt; otherwise they are
                documents and get theirs.

        Returns:
            (len(texts), dimension) float32, each row of length 1.

        Raises:
            ValueError: a vector is not finite.
        """
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        prompt = self._prompt("query_prompt" if is_query else "document_prompt")
        self._warn_if_too_long(texts, prompt, "query" if is_query else "document")
        return self._encode(texts, prompt, self.settings.truncate_dim)

    @property
    def _is_static(self) -> bool:
        """True for static embeddings, which look tokens up and have no window."""
        return not isinstance(self.model.tokenizer, PreTrainedTokenizerBase)

    def _encode(self, texts: Sequence[str], prompt: str, truncate_dim: int | None) -> np.ndarray:
        batch_size = self.batch_size
        if self._is_static or self.settings.backend == "openvino":
            batch_size = max(batch_size, UNPADDED_BATCH_SIZE)
        vectors = self.model.encode(
            list(texts),
            prompt=None if prompt == self._default_prompt else prompt,
            batch_size=batch_size,
            normalize_embeddings=True,
            truncate_dim=truncate_dim,
            convert_to_numpy=True,
            show_progress_bar=False,
        ).astype(np.float32, copy=False)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if bad.size:
            raise ValueError(
                f"{self.label} gave an embedding that is not finite for the text {texts[bad[0]]!r}. "
                "Use another embedding model or another dtype."
            )
        return vectors

    def _warn_if_too_long(self, texts: Sequence[str], prompt: str, kind: str) -> None:
        """Warn of the first query or document that exceeds the model's window."""
        window, tokenizer = self.model.max_seq_length, self.model.tokenizer
        if kind in self._warned or window is None or self._is_static:
            return
        # A token stands for at least one byte, so that a text of few bytes need not be tokenized.
        room = window - tokenizer.num_special_tokens_to_add()
        long = [prompt + text for text in texts if len((prompt + text).encode()) > room]
        if not long:
            return
        length = max(map(len, tokenizer(long, truncation=False, verbose=False)["input_ids"]))
        if length > window:
            self._warned.add(kind)
            logger.warning(
                "%s embeds only the first %d of the %d tokens of a %s. Make the knowledge base with smaller chunks, or "
                "use an embedding model with a longer window. This is reported once.",
                self.label,
                window,
                length,
                kind,
            )


def check_openvino() -> None:
    """Raise KnowledgeBaseError if OpenVINO is missing."""
    if importlib.util.find_spec("openvino") is None:
        raise KnowledgeBaseError("The openvino backend needs OpenVINO: pip install 'transformers-retro[openvino]'.")


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"There is no device {device!r} here ({reason}). Name another one, or none to take the best available."
        ) from error
