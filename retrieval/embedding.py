"""Embedding: text → unit-length vectors, by any sentence-transformers model."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from .identity import short_name

DEFAULT_EMBEDDING_MODEL = "sentence-transformers/all-mpnet-base-v2"
PROBE_SENTENCE = "The quick brown fox jumps over the lazy dog; 3 foxes, 14 dogs, def fox(dog): return not lazy."
PROBE_LENGTH = 32


class Embedder:
    """A sentence-transformers model that gives unit-length float32 vectors.

    Args:
        model: hub name or folder.
        device: as in `SentenceTransformer`; None takes the best there is.
        dtype: of the weights, such as `torch.bfloat16`; None keeps the model's own.
        batch_size: texts that go through the model together.

    Raises:
        OSError: there is no such model, or it cannot be reached.
    """

    def __init__(
        self,
        model: str = DEFAULT_EMBEDDING_MODEL,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
    ) -> None:
        # here and not above: it takes seconds, and a program that embeds nothing should not wait for it
        from sentence_transformers import SentenceTransformer

        self.label = short_name(model)
        self.batch_size = batch_size
        self.model = SentenceTransformer(
            str(model),
            device=None if device is None else str(device),
            model_kwargs={} if dtype is None else {"dtype": dtype},
        )

    @cached_property
    def _probe_vector(self) -> np.ndarray:
        return self.encode([PROBE_SENTENCE])[0]

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return len(self._probe_vector)

    @property
    def probe(self) -> list[float]:
        """First numbers of the embedding of a fixed sentence: recognizes the model, whatever it is called."""
        return [round(float(value), 6) for value in self._probe_vector[:PROBE_LENGTH]]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts; the model sorts them by length by itself.

        Returns:
            (len(texts), dimension) float32, each row of length 1.

        Raises:
            ValueError: the model gave a vector that is not finite.
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
            raise ValueError(f"{self.label} gave an embedding that is not finite for the text {texts[bad[0]]!r}.")
        return vectors
