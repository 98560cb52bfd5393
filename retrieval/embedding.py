"""Embedding: text to unit-length vectors with any sentence-transformers model."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .labels import short_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_EMBEDDING_MODEL = "sentence-transformers/all-mpnet-base-v2"
BATCH_SIZE = 32  # texts that go through the model together, unless another number is given
PROBE_SENTENCE = "The quick brown fox jumps over the lazy dog; 3 foxes, 14 dogs, def fox(dog): return not lazy."
PROBE_LENGTH = 32


class Embedder:
    """A sentence-transformers model that gives unit-length float32 vectors.

    Copying returns the same object. A pickle holds no weights: they are loaded again on first use,
    from the same place.

    Args:
        model: name on the hub, or a folder.
        device: the model's device, such as "cpu" or "cuda:1"; None takes the best available.
        dtype: the weights' type, such as `torch.bfloat16`; None keeps the model's own.
        batch_size: texts in one forward pass.

    Raises:
        OSError: the model does not exist or cannot be reached.
        ValueError: the device does not exist.
    """

    def __init__(
        self,
        model: str = DEFAULT_EMBEDDING_MODEL,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.label = short_name(model)
        self.batch_size = batch_size
        self._source = os.path.abspath(model) if os.path.isdir(model) else str(model)
        self._device = None if device is None else str(device)
        self._dtype = dtype
        self.model  # noqa: B018  load now, so that a wrong name fails here

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("model", "_probe_vector")}

    def __copy__(self) -> "Embedder":
        return self

    def __deepcopy__(self, memo: dict) -> "Embedder":
        return self

    @cached_property
    def model(self) -> "SentenceTransformer":
        """The underlying `SentenceTransformer`, loaded on first use."""
        # Imported lazily: it takes seconds.
        from sentence_transformers import SentenceTransformer

        if self._device is not None:
            _check_device(self._device)
        try:
            return SentenceTransformer(
                self._source,
                device=self._device,
                model_kwargs={} if self._dtype is None else {"dtype": self._dtype},
            )
        except (OSError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise OSError(
                f"Cannot load the embedding model {self._source!r}: {reason}. Give the name of a sentence-transformers "
                "model on the hub, or the folder of one."
            ) from error

    @cached_property
    def _probe_vector(self) -> np.ndarray:
        return self.encode([PROBE_SENTENCE])[0]

    @property
    def dimension(self) -> int:
        """The number of components of a vector."""
        return len(self._probe_vector)

    @property
    def probe(self) -> list[float]:
        """The first numbers of a fixed sentence's embedding: they identify the model."""
        return [round(float(value), 6) for value in self._probe_vector[:PROBE_LENGTH]]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts. The model sorts them by length itself.

        Returns:
            (len(texts), dimension) float32, each row of length 1.

        Raises:
            ValueError: a vector is not finite.
        """
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        vectors = self.model.encode(
            list(texts),
            batch_size=self.batch_size,
            normalize_embeddings=True,
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


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"There is no device {device!r} here ({reason}). Name another one, or none to take the best available."
        ) from error
