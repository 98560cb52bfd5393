"""MilvusStore: the one collection of a knowledge base, on Milvus Lite, a server or a cluster alike."""

import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pymilvus import MilvusClient
from tenacity import Retrying, retry_if_exception, retry_if_result, stop_after_delay, wait_random

from .addresses import TLS, locate, no_file
from .chunking import Chunk
from .connection import MilvusConnection
from .errors import KnowledgeBaseError
from .filters import Filter, all_of, filter_expression
from .identity import Identity
from .indexes import IndexSettings, recommend
from .rows import VECTOR_TYPES, collection_schema, doc_key, row_of

# Collection properties. Milvus Lite keeps them and no description.
IDENTITY, INDEX, REVISION, SOURCES = "retro.identity", "retro.index", "retro.revision", "retro.sources"
MAX_SOURCES = 100  # names of sources that a collection remembers
ROWS_PER_CALL = 500
MOST_HITS = 16384  # that Milvus returns for one vector
HITS_PER_CALL = 65536  # bounds the size of an answer: some 50 MB with chunks of 64 tokens
KEYS_PER_CALL = 10_000
HALF_SINCE = (2, 4)


def check_collection_name(name: str) -> None:
    """Raise ValueError unless Milvus allows a collection of that name. Milvus Lite allows more; servers do not."""
    if len(name) > 255 or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            f"{name!r} is not a collection's name: Milvus wants letters from a to z, digits and underscores, no digit first, "
            "at most 255 characters."
        )


class MilvusStore:
    """Rows of a collection: a chunk, its continuation, its document's metadata, and its embedding.

    Args:
        uri: as for [`MilvusConnection`].
        collection_name: the collection; `create` makes it, `open` expects it.
        token, database, tls, timeout: as for [`MilvusConnection`].
        search_params: parameters of the index for searching, such as {"ef": 128}; what is not named is as it was when the
            index was made.

    Raises:
        KnowledgeBaseError: as [`MilvusConnection`] does.
        ValueError: Milvus allows no collection of that name.
    """

    def __init__(
        self,
        uri: str | os.PathLike | None,
        collection_name: str,
        *,
        token: str | None = None,
        database: str | None = None,
        tls: TLS | None = None,
        timeout: float = 120.0,
        search_params: Mapping[str, int] | None = None,
    ) -> None:
        _, path = locate(uri)
        if path is None or not os.path.exists(path):  # Milvus Lite files may hold collections with other names
            check_collection_name(collection_name)
        self.collection_name = collection_name
        self.connection = MilvusConnection(uri, token=token, database=database, tls=tls, timeout=timeout)
        self._given_search_params = dict(search_params or {})
        self._index: IndexSettings | None = None
        self._dtype: np.dtype | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None, "_dtype": None}  # may be others by the time that it is unpickled

    def __repr__(self) -> str:
        return f"MilvusStore({self.where})"

    @property
    def where(self) -> str:
        """Names the collection in messages."""
        return f"collection {self.collection_name!r} at {self.connection.uri}"

    @property
    def client(self) -> MilvusClient:
        """The underlying `MilvusClient`."""
        return self.connection.client

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of `MilvusClient`, of this collection; raises KnowledgeBaseError when it fails for good."""
        return self.connection.call(method, self.collection_name, *args, **kwargs)

    @classmethod
    def open(cls, uri: str | os.PathLike | None, collection_name: str, **kwargs: Any) -> "MilvusStore":
        """Open a knowledge base that exists; arguments as for the class.

        Raises:
            KnowledgeBaseError: there is no such file, or no such collection in it.
        """
        named, path = locate(uri)
        if path is not None and not os.path.exists(path):
            raise KnowledgeBaseError(no_file(named))
        store = cls(uri, collection_name, **kwargs)
        try:
            if not store.exists():
                there = ", ".join(map(repr, sorted(store.connection.call("list_collections")))) or "none"
                raise KnowledgeBaseError(f"There is no {store.where}; collections there: {there}.")
        except BaseException:
            store.close()
            raise
        return store

    def exists(self) -> bool:
        """Return True if the collection is there. It is then loaded, since only a loaded one can be read."""
        if not self.call("has_collection"):
            return False
        if not self.call("list_indexes"):  # killed between making it and its index
            self._build_index(self.index())
        if self.connection.owns_file:  # rows that a killed process left in the log are searched 30 times slower
            self.flush()
        self.call("load_collection")
        return True

    def create(
        self,
        identity: Identity,
        *,
        index: IndexSettings | None = None,
        expected_rows: int | None = None,
        vector_dtype: str = "float32",
    ) -> None:
        """Make the collection; one that another process made meanwhile is left as it is.

        Args:
            identity: what its rows are made with.
            index: default: what [`recommend`] says of `expected_rows`; without them, exact search on Milvus Lite and HNSW
                on a server.
            vector_dtype: "float32", or "float16" or "bfloat16" where the server knows them (2.4 or newer).

        Raises:
            KnowledgeBaseError: the server does not know the index or the type.
            ValueError: there is no such type, the index' parameters do not go with the dimension, or Milvus allows no
                collection of that name.
        """
        check_collection_name(self.collection_name)
        if vector_dtype not in VECTOR_TYPES:
            raise ValueError(f"vector_dtype must be one of {', '.join(VECTOR_TYPES)}, not {vector_dtype!r}.")
        is_lite, version = self.connection.is_lite, self.connection.version
        if vector_dtype != "float32" and (is_lite or version < HALF_SINCE):
            raise KnowledgeBaseError(
                f"{vector_dtype} vectors need a Milvus server 2.4 or newer; at {self.connection.uri} is "
                f"{'Milvus Lite' if is_lite else 'version ' + '.'.join(map(str, version))}. Use float32."
            )
        settings = index or (
            recommend(expected_rows, is_lite=is_lite)
            if expected_rows is not None
            else IndexSettings.parse("FLAT" if is_lite else "HNSW")
        )
        settings.check(self.where, is_lite=is_lite, version=version, dimension=identity.embedding_dimension)
        properties = {IDENTITY: identity.to_json(), INDEX: _index_card(settings, index is None), REVISION: "0"}
        try:
            self.call(
                "create_collection",
                schema=collection_schema(identity, vector_dtype),
                properties=properties,
            )
            self._build_index(settings, identity.embedding_dimension)
            self.call("load_collection")
        except KnowledgeBaseError:
            # of two ingestions that start at once, one makes it, which may take a moment
            appears = Retrying(
                retry=retry_if_result(lambda is_there: not is_there),
                stop=stop_after_delay(2),
                wait=wait_random(0, 0.2),
                retry_error_callback=lambda state: False,
            )
            if not appears(self.exists):
                raise

    def _properties(self) -> dict[str, str]:
        return self.call("describe_collection").get("properties", {})

    def identity(self) -> Identity:
        """The identity card that the collection was made with.

        Raises:
            KnowledgeBaseError: it has none (another program made it), or a damaged one.
        """
        description = self.call("describe_collection")
        card = description.get("properties", {}).get(IDENTITY) or description.get("description")
        if not card:
            raise KnowledgeBaseError(
                f"{self.where} has no identity card: it was not made by `python -m retrieval ingest`."
            )
        return Identity.from_json(card, self.where)

    def index(self) -> IndexSettings:
        """The index and its parameters."""
        if self._index is None:
            card = json.loads(self._properties().get(INDEX, '{"kind": "FLAT"}'))
            card.pop("automatic", None)
            self._index = IndexSettings.of(card.pop("kind"), card | self._given_search_params)
        return self._index

    def _build_index(self, settings: IndexSettings, dimension: int | None = None) -> None:
        params = MilvusClient.prepare_index_params()
        dimension = dimension or self.identity().embedding_dimension
        params.add_index(
            "embedding", index_type=settings.kind, metric_type="IP", params=settings.build_params(dimension)
        )
        # Milvus Lite builds when the collection is loaded: there is nothing to wait for, and no clock to wait by
        try:
            self.call("create_index", params, sync=not self.connection.is_lite)
        except KnowledgeBaseError:
            if not self.call("list_indexes"):  # nobody else has built one meanwhile
                raise

    def reindex(self, settings: IndexSettings, *, automatic: bool = False) -> None:
        """Build another index over the same rows. Searches wait meanwhile; nothing is embedded again.

        Raises:
            KnowledgeBaseError: the server does not know it; the old one then stays.
            ValueError: its parameters do not go with the dimension.
        """
        dimension = self.identity().embedding_dimension
        settings.check(
            self.where, is_lite=self.connection.is_lite, version=self.connection.version, dimension=dimension
        )
        self.flush()
        self._drop_index()
        # said before it is built: whoever finds the collection without an index builds the one that was asked for
        self.call("alter_collection_properties", {INDEX: _index_card(settings, automatic)})
        self._index = settings
        self._build_index(settings, dimension)
        self.call("load_collection")

    def _drop_index(self) -> None:
        """Release the collection and drop its index; once more when somebody who searches has loaded it in between."""
        retrying = Retrying(
            # Milvus' own words, which name no collection
            retry=retry_if_exception(lambda error: "loaded" in str(error.__cause__)),
            stop=stop_after_delay(self.connection.timeout),
            wait=wait_random(0, 0.2),
            reraise=True,
        )
        for attempt in retrying:
            with attempt:
                self.call("release_collection")
                self.call("drop_index", "embedding")

    def fit_index(self) -> None:
        """On Milvus Lite, build the index that suits the size that the collection has grown to, unless one was asked for.

        Of several processes that fill a file, the one that has opened it does this; on a server, where others search
        meanwhile, nobody.
        """
        if not self.connection.owns_file or not json.loads(self._properties().get(INDEX, "{}")).get("automatic"):
            return
        better = recommend(self.count(), is_lite=True)
        if better.kind != self.index().kind:
            self.reindex(better, automatic=True)

    def count(self, expression: str = "") -> int:
        """Rows that a search can see, of those that match a filter expression."""
        rows = self.call("query", filter=expression, output_fields=["count(*)"], consistency_level="Strong")
        return int(rows[0]["count(*)"])

    def chunks_of(self, doc_ids: Iterable[str]) -> dict[str, int]:
        """Primary key -> content hash of every row of these documents."""
        expression = _documents(doc_ids)
        if not expression:
            return {}
        # page by page: one document can have more rows than Milvus returns at once
        return {row["pk"]: row["content_hash"] for row in self.scan(("pk", "content_hash"), expression)}

    def scan(self, fields: Sequence[str], expression: str = "", page: int = 5000) -> Iterator[dict[str, Any]]:
        """All rows, or those that match, in the order of their keys, in bounded memory.

        Args:
            fields: columns to read; "pk" is always among them.
            page: rows read at a time.
        """
        last = ""
        # servers return what comes first in the order of keys; Milvus Lite does so if told that this is an iteration
        order = {"iterator": "True"} if self.connection.is_lite else {}
        while True:
            rows = self.call(
                "query",
                filter=all_of([expression, f'pk > "{last}"']),
                limit=page,
                output_fields=sorted({"pk", *fields}),
                consistency_level="Strong",
                **order,
            )
            yield from rows
            if len(rows) < page:
                return
            last = rows[-1]["pk"]

    def upsert(self, chunks: Sequence[Chunk], embeddings: np.ndarray) -> None:
        """Write chunks with their embeddings (n, dimension); one that is there already is replaced.

        Raises:
            ValueError: a document id longer than 4096 bytes.
        """
        vectors = np.asarray(embeddings, dtype=self._vector_dtype())
        rows = [row_of(chunk, vector) for chunk, vector in zip(chunks, vectors, strict=True)]
        for start in range(0, len(rows), ROWS_PER_CALL):
            self.call("upsert", rows[start : start + ROWS_PER_CALL])

    def _vector_dtype(self) -> np.dtype:
        if self._dtype is None:
            fields = {field["name"]: field["type"] for field in self.call("describe_collection")["fields"]}
            name = next(name for name, kind in VECTOR_TYPES.items() if kind == fields["embedding"])
            if name == "bfloat16":
                import ml_dtypes

                self._dtype = np.dtype(ml_dtypes.bfloat16)
            else:
                self._dtype = np.dtype(name)
        return self._dtype

    def delete(self, keys: Sequence[str]) -> None:
        """Delete rows by primary key."""
        for start in range(0, len(keys), ROWS_PER_CALL):
            self.call("delete", ids=list(keys[start : start + ROWS_PER_CALL]))

    def delete_documents(self, doc_ids: Collection[str] | None = None, where: Filter | None = None) -> int:
        """Delete documents by their ids, or all whose metadata match a filter.

        Returns:
            the number of chunks that are gone. Unknown ids are none.

        Raises:
            ValueError: neither or both are given, an empty filter, or one that cannot be.
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
            ids = sorted(set(doc_ids))
            expressions = [_documents(ids[i : i + KEYS_PER_CALL]) for i in range(0, len(ids), KEYS_PER_CALL)]
        deleted = 0
        for expression in expressions:
            # by key, page by page: what is counted is what goes, also while others write
            keys = [row["pk"] for row in self.scan(("pk",), expression)]
            self.delete(keys)
            deleted += len(keys)
        self.touch()
        return deleted

    def search(
        self, embeddings: np.ndarray, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[dict[str, Any]]]:
        """The nearest rows to each embedding (n, dimension), best first, with all that the model reads.

        Args:
            limit: rows for each, at most.
            exclude: `doc_key`s of documents to leave out.
            expression: what rows must match besides.
        """
        found: list[list[dict[str, Any]]] = []
        vectors = np.asarray(embeddings, dtype=self._vector_dtype())
        matching = all_of([_without(exclude), expression])
        step = max(1, HITS_PER_CALL // limit)
        for start in range(0, len(vectors), step):
            hits = self._hits(
                list(vectors[start : start + step]),
                limit=limit,
                filter=matching,
                output_fields=["doc_id", "doc_key", "chunk_index", "tokens", "continuation"],
                search_params=self.index().search_params(limit),
                # sees this process's own writes at once and others' within moments; "Strong" waits 200 ms on a server
                consistency_level="Session",
            )
            found += [[{**hit["entity"], "score": hit["distance"]} for hit in near] for near in hits]
        return found

    def _hits(self, vectors: list[np.ndarray], **search: Any) -> list[list[dict[str, Any]]]:
        """Search, and wait while the collection cannot be read."""
        deadline = time.monotonic() + self.connection.timeout
        while not all(hits := self.call("search", vectors, **search)) and not self._is_readable():
            if time.monotonic() > deadline:
                raise KnowledgeBaseError(
                    f"{self.where} has rows, but none could be read for {self.connection.timeout:.0f} s: is its index "
                    "being built? A longer wait can be asked for with `timeout`."
                )
            time.sleep(0.2)
        return hits

    def _is_readable(self) -> bool:
        """False while a server that holds rows finds none: it does so for some seconds while an index is built anew."""
        return self.count() > 0 or not int(self.call("get_collection_stats")["row_count"])

    def search_exactly(
        self, embeddings: np.ndarray, limit: int, *, exclude: Iterable[int] = (), expression: str = ""
    ) -> list[list[dict[str, Any]]]:
        """The same by reading every row: for when an approximate index has not found rows that exist."""
        best: list[list[dict[str, Any]]] = [[] for _ in embeddings]
        fields = ("doc_id", "doc_key", "chunk_index", "tokens", "continuation", "embedding")
        page: list[dict[str, Any]] = []

        def take() -> None:
            scores = embeddings @ np.stack([self.vector(row.pop("embedding")) for row in page]).T
            for number, near in enumerate(scores):
                candidates = best[number] + [
                    {**page[place], "score": float(near[place])} for place in np.argsort(-near)[:limit]
                ]
                best[number] = sorted(candidates, key=lambda row: -row["score"])[:limit]
            page.clear()

        for row in self.scan(fields, all_of([_without(exclude), expression])):
            page.append(row)
            if len(page) == 1000:
                take()
        if page:
            take()
        return best

    def vector(self, stored: Any) -> np.ndarray:
        """An embedding as Milvus returns it, as float32."""
        if isinstance(stored, bytes):
            return np.frombuffer(stored, dtype=self._vector_dtype()).astype(np.float32)
        return np.asarray(stored).astype(np.float32)

    def catch_up(self) -> None:
        """Have all later searches see what anyone has written until now; a server takes some tenths of a second for it."""
        self.call("query", filter='pk == ""', limit=1, output_fields=["pk"], consistency_level="Strong")

    def how_many(self, *, exclude: Iterable[int] = (), expression: str = "", at_most: int) -> int:
        """How many rows a search could return, counted no further than `at_most`."""
        rows = self.call(
            "query",
            filter=all_of(['pk > ""', _without(exclude), expression]),
            limit=at_most,
            output_fields=["pk"],
            consistency_level="Session",
        )
        return len(rows)

    def flush(self) -> None:
        """Have all that was written on disk."""
        self.call("flush")

    def touch(self, sources: Iterable[str] = ()) -> None:
        """Say that rows have changed, so that those who remember neighbors forget them; and name where rows came from."""
        properties = {REVISION: f"{time.time_ns()}"}
        names = set(self.sources())
        if new := set(sources) - names:
            properties[SOURCES] = json.dumps(sorted(names | new)[:MAX_SOURCES])
        self.call("alter_collection_properties", properties)

    def revision(self) -> str:
        """Another value whenever rows have changed through this library."""
        return self._properties().get(REVISION, "")

    def sources(self) -> list[str]:
        """Names of the sources of its documents, the first hundred."""
        return json.loads(self._properties().get(SOURCES, "[]"))

    def health(self) -> dict[str, str | int]:
        """Return the size, the index and its state, whether it is loaded, and the server's version."""
        index = self.call("describe_index", "embedding")
        waiting = int(index.get("pending_index_rows") or 0)
        state = self.call("get_load_state")["state"]
        lite = "Milvus Lite " if self.connection.is_lite else "Milvus "
        settings = self.index()
        parameters = ", ".join(f"{name} {value}" for name, value in {**settings.build, **settings.search}.items())
        return {
            "chunks": self.count(),
            "vectors": self._vector_dtype().name,
            "index": f"{index['index_type']}" + (f" ({parameters})" if parameters else ""),
            "index state": f"{waiting} rows to go" if waiting else "complete",
            "loaded": "yes" if state.name == "Loaded" else state.name,
            "server": lite + ".".join(map(str, self.connection.version)),
        }

    def close(self) -> None:
        """Let go of the collection. After the last one on a Milvus Lite file, another process can open the file."""
        self.connection.close()


def _documents(doc_ids: Iterable[str]) -> str:
    keys = sorted({doc_key(doc_id) for doc_id in doc_ids})
    return f"doc_key in {keys}" if keys else ""


def _without(keys: Iterable[int]) -> str:
    keys = sorted(keys)
    return f"doc_key not in {keys}" if keys else ""


def _index_card(settings: IndexSettings, automatic: bool) -> str:
    """Return the text that `MilvusStore.index` reads; `automatic` if nobody asked for this index."""
    return json.dumps({"kind": settings.kind, **settings.build, **settings.search, "automatic": automatic})
