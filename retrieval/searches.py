"""Searches of a collection by meaning, by words, or by both, with scores on one bounded scale."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .analyzers import searched_text
from .connection import RRF_K, Row
from .embedding import Embedder, EmbedderSettings
from .errors import KnowledgeBaseError
from .identity import Identity, check_search
from .rows import VECTORS
from .store import MilvusStore

# Rows of each search that a hybrid search fuses, at least: a row that is second in neither list
# can be first in the fused one.
FUSED = 32
# Scores that differ by rounding alone count as equal, and ties are ordered by document and chunk.
SCORE_DIGITS, FUSED_DIGITS = 5, 8


@dataclass(frozen=True)
class Queries:
    """Queries of one request.

    Attributes:
        texts: n texts; as Milvus cuts them into words, if the search looks at these.
        vectors: their embeddings (n, dimension), if the search looks at these, else None.
    """

    texts: Sequence[str]
    vectors: np.ndarray | None

    def take(self, places: Sequence[int]) -> "Queries":
        """Return some of the queries."""
        vectors = None if self.vectors is None else self.vectors[list(places)]
        return Queries([self.texts[place] for place in places], vectors)


class Search(Protocol):
    """A way to search a collection.

    Attributes:
        is_exact: fewer rows than asked for are all there are. An approximate index may miss some.
    """

    is_exact: bool

    def queries(self, texts: Sequence[str]) -> Queries:
        """Return what to search for; embeds the texts if need be."""
        ...

    def best(
        self, queries: Queries, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[Row]]:
        """Return the best rows for each query, in their order, each with its bounded "score".

        Args:
            limit: rows for each query, at most.
            exclude: `doc_key`s of documents to leave out.
            expression: a filter expression that rows must match.
        """
        ...

    def all_best(
        self, queries: Queries, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[Row]]:
        """Do the same, but miss no row: fewer rows than `limit` are all there are."""
        ...


class DenseSearch:
    """Search by meaning: rows by the cosine of their embedding and the query's."""

    is_exact = False

    def __init__(self, store: MilvusStore, embedder: Embedder) -> None:
        self.store, self.embedder = store, embedder

    def queries(self, texts: Sequence[str]) -> Queries:
        """Return the texts with their embeddings."""
        return Queries(texts, self.embedder.encode(texts, is_query=True))

    def best(
        self, queries: Queries, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[Row]]:
        """Return the best rows for each query; see [`Search.best`]."""
        found = self.store.search(_vectors(queries), limit, exclude=exclude, expression=expression)
        return [in_order(rows) for rows in found]

    def all_best(
        self, queries: Queries, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[Row]]:
        """Return the best rows for each query, all that there are; see [`Search.all_best`]."""
        found = self.best(queries, limit, exclude=exclude, expression=expression)
        if missed := _missed(self.store, found, limit, exclude, expression):
            vectors = _vectors(queries.take(missed))
            exact = self.store.search_exactly(vectors, limit, exclude=exclude, expression=expression)
            for place, rows in zip(missed, exact, strict=True):
                found[place] = in_order(rows)
        return found


class WordSearch:
    """Search by words: rows by their BM25 score, mapped into [0, 1) by [`bounded`]."""

    is_exact = True

    def __init__(self, store: MilvusStore) -> None:
        self.store = store

    def queries(self, texts: Sequence[str]) -> Queries:
        """Return the texts as Milvus cuts them into words."""
        analyzer = self.store.analyzer()
        return Queries([text if analyzer is None else searched_text(text, analyzer) for text in texts], None)

    def best(
        self, queries: Queries, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[Row]]:
        """Return the best rows for each query; see [`Search.best`]."""
        found = self.store.search_words(queries.texts, limit, exclude=exclude, expression=expression)
        for text, rows in zip(queries.texts, found, strict=True):
            for row in rows:
                row["score"] = bounded(row["score"], text)
        return [in_order(rows) for rows in found]

    all_best = best  # Milvus' index of words is exact


class HybridSearch:
    """Search by both: rows by reciprocal rank fusion of the two, scored by their cosine.

    Each search contributes its best rows, at least 32; a row of rank r in it gains 1 / (60 + r).
    """

    is_exact = False

    def __init__(self, store: MilvusStore, embedder: Embedder) -> None:
        self.store, self.embedder = store, embedder
        self._dense, self._words = DenseSearch(store, embedder), WordSearch(store)

    def queries(self, texts: Sequence[str]) -> Queries:
        """Return the texts as Milvus cuts them into words, with their embeddings."""
        return Queries(self._words.queries(texts).texts, self._dense.queries(texts).vectors)

    def best(
        self, queries: Queries, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[Row]]:
        """Return the best rows for each query; see [`Search.best`]."""
        vectors, depth = _vectors(queries), max(limit, FUSED)
        found = self.store.search_both(vectors, queries.texts, limit, depth, exclude=exclude, expression=expression)
        return [_with_cosines(rows, vector) for rows, vector in zip(found, vectors, strict=True)]

    def all_best(
        self, queries: Queries, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[Row]]:
        """Return the best rows for each query, all that there are; see [`Search.all_best`]."""
        found = self.best(queries, limit, exclude=exclude, expression=expression)
        if missed := _missed(self.store, found, limit, exclude, expression):
            some, depth = queries.take(missed), max(limit, FUSED)
            near = self._dense.all_best(some, depth, exclude=exclude, expression=expression)
            shared = self.store.search_words(
                some.texts, depth, exclude=exclude, expression=expression, with_vectors=True
            )
            for place, one, other, vector in zip(missed, near, shared, _vectors(some), strict=True):
                for row in other:
                    row["score"] = float(vector @ row.pop(VECTORS))
                found[place] = fused(one, other)[:limit]
        return found


def search_of(store: MilvusStore, identity: Identity, search: str | None, embedder: Embedder | None) -> Search:
    """Return a way to search a collection.

    Args:
        identity: the collection's.
        search: "dense", "bm25" or "hybrid"; None for the one that the collection was built for.
        embedder: the embedding model; None for "bm25".

    Raises:
        KnowledgeBaseError: the collection was not built for this search.
        ValueError: there is no such search, or it does not go together with the embedding model.
    """
    search = wanted_search(store, identity, search)
    check_search(search, embedding_model=embedder.label if embedder else None)
    if search == "bm25":
        return WordSearch(store)
    if embedder is None:
        raise ValueError(
            f"Search {search!r} needs the embedding model that {store.where} was built with, "
            f"{identity.embedding_model!r}. Give one."
        )
    return DenseSearch(store, embedder) if search == "dense" else HybridSearch(store, embedder)


def wanted_search(store: MilvusStore, identity: Identity, search: str | None) -> str:
    """Return the name of the search that is asked for, or else the one that the collection is for.

    Raises:
        KnowledgeBaseError: the collection was not built for it.
        ValueError: there is no such search.
    """
    if search is None:
        return identity.search
    check_search(search)
    if search != identity.search and identity.search != "hybrid":
        raise KnowledgeBaseError(
            f"{store.where} was built for search {identity.search!r}, and {search!r} is asked for. Search by "
            f"{identity.search!r}, or ingest its documents into another collection with --search {search}."
        )
    return search


def load_embedder(
    identity: Identity,
    search: str,
    model: str | None,
    settings: EmbedderSettings | None = None,
    *,
    device: str | torch.device | None = None,
) -> Embedder | None:
    """Load the embedding model for a search, by default the collection's own; None for "bm25".

    Raises:
        ValueError: a model or its settings are given for "bm25".
    """
    check_search(search, embedding_model=model, embedding_settings=settings)
    name = model or identity.embedding_model
    return None if search == "bm25" or name is None else Embedder(name, settings=settings, device=device)


def bounded(score: float, query: str) -> float:
    """Return a BM25 score on a scale from 0 to 1: s / (s + n) for a query of n different words.

    It grows with the mean gain per word, s / n, so short and long queries are comparable.
    """
    words = len(set(re.findall(r"\w+", query.lower()))) or 1
    return score / (score + words)


def in_order(rows: list[Row]) -> list[Row]:
    """Sort rows by their score; equal ones, which Milvus returns in any order, by document."""
    return sorted(rows, key=lambda row: (-round(row["score"], SCORE_DIGITS), row["doc_id"], row["chunk_index"]))


def fused(*rankings: list[Row]) -> list[Row]:
    """Return the rows of the rankings by reciprocal rank fusion, as Milvus computes it."""
    gains: dict[tuple[str, int], float] = {}
    rows: dict[tuple[str, int], Row] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, 1):
            place = row["doc_id"], row["chunk_index"]
            gains[place] = gains.get(place, 0.0) + 1 / (RRF_K + rank)
            rows.setdefault(place, row)
    return [rows[place] for place in sorted(gains, key=lambda place: (-round(gains[place], FUSED_DIGITS), place))]


def _with_cosines(rows: list[Row], vector: np.ndarray) -> list[Row]:
    """Order the rows of a fused search, and score them by their cosine."""
    rows = sorted(rows, key=lambda row: (-round(row["score"], FUSED_DIGITS), row["doc_id"], row["chunk_index"]))
    for row in rows:
        row["score"] = float(vector @ row.pop(VECTORS))
    return rows


def _vectors(queries: Queries) -> np.ndarray:
    assert queries.vectors is not None, "made by DenseSearch.queries"
    return queries.vectors


def _missed(
    store: MilvusStore, found: list[list[Row]], limit: int, exclude: Iterable[int], expression: str
) -> list[int]:
    """Return the queries for which an approximate index did not reach all rows behind a filter."""
    there = store.how_many(exclude=exclude, expression=expression, at_most=limit)
    return [place for place, rows in enumerate(found) if len(rows) < there]
