"""MilvusStore: the rows of a knowledge base; read, written, deleted and searched."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from pymilvus import AnnSearchRequest

from .chunking import Chunk
from .collection import MilvusCollection
from .connection import Row
from .errors import KnowledgeBaseError
from .filters import Filter, all_of, filter_expression
from .rows import VECTORS, WORDS, doc_key, row_of

ROWS_PER_CALL = 512
MOST_HITS = 16384  # Milvus returns no more for one vector
HITS_PER_CALL = 65536  # bounds an answer's size: some 50 MB with chunks of 64 tokens
KEYS_PER_CALL = 10_000
ROWS_PER_PAGE = 5000
ROWS_COMPARED = 1000  # rows that an exact search compares at a time
# columns that a search returns
READ_BY_MODELS = ("doc_id", "doc_key", "chunk_index", "tokens", "continuation")


class MilvusStore(MilvusCollection):
    """The rows of a collection: chunk, continuation, metadata of its document, embedding, text.

    Arguments and errors as for [`MilvusCollection`].
    """

    def chunks_of(self, doc_ids: Iterable[str]) -> dict[str, int]:
        """Return the primary key and content hash of every chunk of these documents."""
        expression = _documents(doc_ids)
        if not expression:
            return {}
        # page by page: one document can have more rows than Milvus returns at once
        return {row["pk"]: row["content_hash"] for row in self.scan(("content_hash",), expression)}

    def scan(self, fields: Sequence[str], expression: str = "", page: int = ROWS_PER_PAGE) -> Iterator[Row]:
        """Yield the rows that match, all by default, in the order of their keys, in bounded memory.

        Args:
            fields: columns to read; "pk" is always among them.
            page: rows read at a time.
        """
        last = ""
        while True:
            rows = self.connection.query(
                self.collection_name,
                all_of([expression, f'pk > "{last}"']),
                sorted({"pk", *fields}),
                limit=page,
                in_key_order=True,
            )
            yield from rows
            if len(rows) < page:
                return
            last = rows[-1]["pk"]

    def upsert(
        self, chunks: Sequence[Chunk], embeddings: np.ndarray | None, texts: Sequence[str] | None = None
    ) -> None:
        """Write chunks; one that is there already is replaced.

        Args:
            embeddings: (n, dimension), or None in a collection without embeddings.
            texts: n texts, in a collection that is searched by words.

        Raises:
            ValueError: a document id longer than 4096 bytes, or no texts for search by words.
        """
        vectors = [None] * len(chunks) if embeddings is None else np.asarray(embeddings, dtype=self.vector_dtype())
        written = zip(chunks, vectors, [None] * len(chunks) if texts is None else texts, strict=True)
        analyzer = self.analyzer()
        rows = [row_of(chunk, vector, text, analyzer) for chunk, vector, text in written]
        for start in range(0, len(rows), ROWS_PER_CALL):
            self.connection.upsert(self.collection_name, rows[start : start + ROWS_PER_CALL])

    def delete(self, keys: Sequence[str]) -> None:
        """Delete rows by primary key."""
        for start in range(0, len(keys), ROWS_PER_CALL):
            self.connection.delete(self.collection_name, list(keys[start : start + ROWS_PER_CALL]))

    def delete_documents(self, doc_ids: Collection[str] | None = None, where: Filter | None = None) -> int:
        """Delete documents by their ids, or all whose metadata match a filter.

        Returns:
            the number of chunks that were deleted; unknown ids add nothing.

        Raises:
            ValueError: neither or both are given, or the filter is empty or malformed.
        """
        if (doc_ids is None) == (where is None):
            raise ValueError("Name documents to delete, or give a filter; one of the two.")
        if isinstance(doc_ids, str):
            raise ValueError(f"doc_ids is {doc_ids!r}: give a collection of ids, such as {[doc_ids]!r}.")
        if where is not None:
            expression = filter_expression(where)
            if not expression:
                raise ValueError("An empty filter would delete every document; drop the collection if that is meant.")
            expressions = [expression]
        else:
            ids = sorted(set(doc_ids or ()))
            expressions = [_documents(ids[i : i + KEYS_PER_CALL]) for i in range(0, len(ids), KEYS_PER_CALL)]
        deleted = 0
        for expression in expressions:
            # by key, page by page: the count is exact also while others write
            keys = [row["pk"] for row in self.scan(("pk",), expression)]
            self.delete(keys)
            deleted += len(keys)
        self.touch()
        return deleted

    def search(
        self, embeddings: np.ndarray, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[Row]]:
        """Return the nearest rows to each embedding (n, dimension), best first, with their "score".

        Args:
            limit: rows for each embedding, at most.
            exclude: `doc_key`s of documents to leave out.
            expression: a filter expression that rows must match.
        """
        vectors = list(np.asarray(embeddings, dtype=self.vector_dtype()))
        return self._search(VECTORS, vectors, limit, self.index().search_params(limit), exclude, expression)

    def search_words(
        self,
        texts: Sequence[str],
        limit: int,
        *,
        exclude: Iterable[int] = (),
        expression: str = "",
        with_vectors: bool = False,
    ) -> list[list[Row]]:
        """Return the rows that share most words with each text, by their BM25 score.

        Other arguments as for `search`. Only rows that share a word are returned. All of them are,
        if they are fewer than the limit: the index is exact.

        Args:
            texts: as [`searched_text`] returns them.
            with_vectors: rows get their "embedding" (dimension,), too.
        """
        fields = (*READ_BY_MODELS, VECTORS) if with_vectors else READ_BY_MODELS
        found = self._search(WORDS, list(texts), limit, {"params": {}}, exclude, expression, fields)
        for row in (row for near in found for row in near):
            row["score"] = abs(row["score"])  # Milvus Lite returns -score
            if with_vectors:
                row[VECTORS] = self.vector(row[VECTORS])
        return found

    def search_both(
        self,
        embeddings: np.ndarray,
        texts: Sequence[str],
        limit: int,
        depth: int,
        *,
        exclude: Iterable[int] = (),
        expression: str = "",
    ) -> list[list[Row]]:
        """Search by embeddings (n, dimension) and by n texts in one request, fused by rank.

        Args:
            texts: as [`searched_text`] returns them.
            limit: rows for each query, at most.
            depth: rows of each of the two searches that are fused.
            exclude, expression: as for `search`.

        Returns:
            rows with their "embedding" (dimension,) and, as their "score", the sum of 1 / (60 +
            rank) over both searches.
        """
        vectors = list(np.asarray(embeddings, dtype=self.vector_dtype()))
        matching = all_of([_without(exclude), expression])
        parameters = self.index().search_params(depth)
        found: list[list[Row]] = []
        for part in _parts(len(vectors), 2 * depth):
            requests = [
                AnnSearchRequest(vectors[part], VECTORS, {"metric_type": "IP", **parameters}, depth, expr=matching),
                AnnSearchRequest(list(texts[part]), WORDS, {"metric_type": "BM25", "params": {}}, depth, expr=matching),
            ]
            search = partial(self.connection.hybrid_search, self.collection_name, requests)
            found += self._rows(partial(search, limit=limit, fields=(*READ_BY_MODELS, VECTORS)))
        for row in (row for near in found for row in near):
            row[VECTORS] = self.vector(row[VECTORS])
        return found

    def _search(
        self,
        column: str,
        queries: list[np.ndarray] | list[str],
        limit: int,
        parameters: dict[str, Any],
        exclude: Iterable[int],
        expression: str,
        fields: Sequence[str] = READ_BY_MODELS,
    ) -> list[list[Row]]:
        matching = all_of([_without(exclude), expression])
        found: list[list[Row]] = []
        for part in _parts(len(queries), limit):
            search = partial(
                self.connection.search,
                self.collection_name,
                queries[part],
                column=column,
                limit=limit,
                expression=matching,
                fields=fields,
                parameters=parameters,
                consistency="Session",  # "Strong" would wait 200 ms on a server
            )
            found += self._rows(search)
        return found

    def _rows(self, search: Callable[[], list[list[Row]]]) -> list[list[Row]]:
        """Search, and wait while the collection cannot be read; return rows with their "score"."""
        deadline = time.monotonic() + self.connection.timeout
        while True:
            hits = search()
            if all(hits) or self._is_readable():
                return [[{**hit["entity"], "score": hit["distance"]} for hit in near] for near in hits]
            if time.monotonic() > deadline:
                raise KnowledgeBaseError(
                    f"{self.where} has rows, but none could be read for {self.connection.timeout:.0f} s: is its index "
                    "being built? A longer wait can be asked for with `timeout`."
                )
            time.sleep(0.2)

    def _is_readable(self) -> bool:
        """Return False while a server that holds rows finds none (it rebuilds its index)."""
        return self.count() > 0 or not self.connection.stored_rows(self.collection_name)

    def search_exactly(
        self, embeddings: np.ndarray, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[Row]]:
        """Search by reading every row, where an approximate index has not found rows that exist.

        Arguments and result as for `search`.
        """
        best: list[list[Row]] = [[] for _ in embeddings]
        page: list[Row] = []

        def take() -> None:
            scores = embeddings @ np.stack([self.vector(row.pop(VECTORS)) for row in page]).T
            for number, near in enumerate(scores):
                candidates = best[number] + [
                    {**page[place], "score": float(near[place])} for place in np.argsort(-near)[:limit]
                ]
                best[number] = sorted(candidates, key=lambda row: -row["score"])[:limit]
            page.clear()

        for row in self.scan((*READ_BY_MODELS, VECTORS), all_of([_without(exclude), expression])):
            page.append(row)
            if len(page) == ROWS_COMPARED:
                take()
        if page:
            take()
        return best

    def vector(self, stored: Any) -> np.ndarray:
        """Return an embedding that Milvus returned as float32 (dimension,)."""
        if isinstance(stored, bytes):
            return np.frombuffer(stored, dtype=self.vector_dtype()).astype(np.float32)
        return np.asarray(stored).astype(np.float32)

    def catch_up(self) -> None:
        """Make later searches see every write until now; a server takes some tenths of a second."""
        self.connection.query(self.collection_name, 'pk == ""', ["pk"], limit=1)

    def how_many(self, *, exclude: Iterable[int] = (), expression: str = "", at_most: int) -> int:
        """Return how many rows a search could return, counted no further than `at_most`."""
        matching = all_of(['pk > ""', _without(exclude), expression])
        rows = self.connection.query(self.collection_name, matching, ["pk"], limit=at_most, consistency="Session")
        return len(rows)


def _parts(queries: int, limit: int) -> Iterator[slice]:
    """Yield the queries of each request, so that no answer is too large."""
    step = max(1, HITS_PER_CALL // limit)
    return (slice(start, start + step) for start in range(0, queries, step))


def _documents(doc_ids: Iterable[str]) -> str:
    keys = sorted({doc_key(doc_id) for doc_id in doc_ids})
    return f"doc_key in {keys}" if keys else ""


def _without(keys: Iterable[int]) -> str:
    keys = sorted(keys)
    return f"doc_key not in {keys}" if keys else ""
