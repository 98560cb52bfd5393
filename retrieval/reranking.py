"""Reranking: a cross-encoder reads each query with its candidates and chooses the best ones."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError

from .connection import Row
from .errors import KnowledgeBaseError
from .labels import short_name

RERANK_CANDIDATES = 20  # unless another number is given
SCORING_ARCHITECTURES = ("ForSequenceClassification", "ForCausalLM")  # how transformers names cross-encoders


class PairScorer(Protocol):
    """An object that says how well texts match, such as sentence-transformers' `CrossEncoder`."""

    def predict(self, pairs: list[tuple[str, str]], /) -> Any:
        """Return one number for each pair of a query and a text; higher is better."""


@dataclass
class RerankerSettings:
    """The settings of reranking, declared once for library, YAML and command line."""

    reranker: str | None = field(
        default=None,
        metadata={
            "help": "Cross-encoder that chooses the neighbors from more candidates, a Hub name or a folder. By default "
            "the search's order counts."
        },
    )
    rerank_candidates: int = field(
        default=RERANK_CANDIDATES, metadata={"help": "Rows that the reranker reads for each query."}
    )


class Reranker:
    """A cross-encoder that sorts the rows found for a query.

    Copying returns the same object. A pickle of a reranker that has a name holds no weights: they
    are loaded again on first use, from the same place.

    Args:
        model: name on the hub or a folder of a sentence-transformers `CrossEncoder`, or an object
            with its `predict`.
        device: the model's device; None takes the best available.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        KnowledgeBaseError: the model cannot be loaded, or does not give one score for a pair.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PairScorer,
        *,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._device = None if device is None else str(device)
        self._trust_remote_code = trust_remote_code
        if isinstance(model, str | os.PathLike):
            self.label = short_name(os.fspath(model))
            self._source: str | None = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
            self.model  # noqa: B018  load now, so that a wrong name fails here
        elif callable(getattr(model, "predict", None)):
            self.label, self._source, self.model = type(model).__name__, None, model
        else:
            raise ValueError(
                f"reranker is {model!r}; give the name or the folder of a cross-encoder, or an object with `predict`."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "model" or self._source is None}

    def __copy__(self) -> "Reranker":
        return self

    def __deepcopy__(self, memo: dict) -> "Reranker":
        return self

    @cached_property
    def model(self) -> PairScorer:
        """The underlying model, loaded on first use."""
        # Imported lazily: it takes seconds.
        from sentence_transformers import CrossEncoder

        try:
            model = CrossEncoder(
                self._source,
                device=self._device,
                trust_remote_code=self._trust_remote_code,
                activation_fn=torch.nn.Identity(),  # a sigmoid would make high scores equal
            )
        except torch.OutOfMemoryError:
            raise
        # a RuntimeError comes without a network
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise self._cannot_load(" ".join(str(error).split()).rstrip(".")) from error
        if model.num_labels != 1:
            raise self._cannot_load(f"it sorts pairs into {model.num_labels} classes instead of scoring them")
        kinds = getattr(model.config, "architectures", None) or ()
        modules = [module for module in model.children() if not isinstance(module, torch.nn.Identity)]
        if len(modules) == 1 and not any(kind.endswith(SCORING_ARCHITECTURES) for kind in kinds):
            # transformers has given it a new, random head
            raise self._cannot_load(f"it is no cross-encoder, but a {' '.join(kinds) or 'model of unknown kind'}")
        return model

    def _cannot_load(self, reason: str) -> KnowledgeBaseError:
        return KnowledgeBaseError(
            f"Cannot load the reranker {self._source!r}: {reason}. Give the name of a sentence-transformers "
            "cross-encoder on the hub, or the folder of one, or no reranker."
        )

    def best(
        self, queries: Sequence[str], candidates: Sequence[Sequence[Row]], texts: Sequence[Sequence[str]], k: int
    ) -> list[list[Row]]:
        """Return the k best candidates of each query, best first. Rows keep the search's scores.

        Equal texts keep the search's order.

        Args:
            queries: n texts.
            candidates: the rows found for each, in the search's order.
            texts: the texts of those rows.

        Raises:
            KnowledgeBaseError: the model gave other than one finite number for a pair.
        """
        pairs = [(query, text) for query, its_texts in zip(queries, texts, strict=True) for text in its_texts]
        unique = list(dict.fromkeys(pairs))  # in other batches, the same pair's score differs by rounding
        scores = dict(zip(unique, self._predict(unique), strict=True)) if unique else {}
        return [
            [rows[place] for place in sorted(range(len(rows)), key=lambda i: -scores[query, its_texts[i]])[:k]]
            for query, rows, its_texts in zip(queries, candidates, texts, strict=True)
        ]

    def _predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        scores = np.asarray(self.model.predict(pairs), dtype=np.float64)
        if scores.shape != (len(pairs),) or not np.isfinite(scores).all():
            raise KnowledgeBaseError(
                f"The reranker {self.label} gave scores of shape {scores.shape} for {len(pairs)} pairs, or some that "
                "are not finite. Use a cross-encoder that gives one number for each pair."
            )
        return scores.tolist()
