"""MilvusCollection: the collection of a knowledge base, with its identity, properties and index."""

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pymilvus import MilvusClient
from tenacity import Retrying, retry_if_exception, retry_if_result, stop_after_delay, wait_random

from .addresses import MilvusAddress, no_file
from .analyzers import Analyzer, check_analyzer
from .connection import MilvusConnection
from .errors import KnowledgeBaseError
from .identity import Identity
from .indexes import IndexSettings, recommend
from .rows import VECTOR_TYPES, VECTORS, WORDS, collection_schema

Self = TypeVar("Self", bound="MilvusCollection")

# Collection properties. Milvus Lite keeps them, but no description.
IDENTITY, INDEX, REVISION, SOURCES = "retro.identity", "retro.index", "retro.revision", "retro.sources"
MAX_SOURCES = 100  # names of sources that a collection remembers
HALF_SINCE = (2, 4)  # first version of a server with vectors of half precision
# BM25's parameters, the same on Milvus Lite, whose default k1 is 1.5, and on servers
BM25_INDEX, BM25_PARAMS = "SPARSE_INVERTED_INDEX", {"bm25_k1": 1.2, "bm25_b": 0.75}
APPEAR_SECONDS = 2.0  # until a collection that another process is making is there


@dataclass(frozen=True)
class NewCollection:
    """The index and the type of vectors of a collection that is made.

    Attributes:
        index: the vector index. Default: the one that [`recommend`] names for `expected_chunks`;
            without either, exact search on Milvus Lite and HNSW on a server.
        expected_chunks: rows that the collection will have, to choose its index by.
        vector_dtype: "float32", or "float16" or "bfloat16" on servers from version 2.4.

    Raises:
        ValueError: there is no such type, or the number of chunks is below 1.
    """

    index: IndexSettings | None = None
    expected_chunks: int | None = None
    vector_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.vector_dtype not in VECTOR_TYPES:
            raise ValueError(f"vector_dtype must be one of {', '.join(VECTOR_TYPES)}, not {self.vector_dtype!r}.")
        if self.expected_chunks is not None and self.expected_chunks < 1:
            raise ValueError(f"expected_chunks is {self.expected_chunks}; it must be 1 or more.")

    def index_settings(self, *, is_lite: bool) -> IndexSettings:
        """Return the index that is asked for, or else the one that suits the size."""
        if self.index is not None:
            return self.index
        if self.expected_chunks is not None:
            return recommend(self.expected_chunks, is_lite=is_lite)
        return IndexSettings.parse("FLAT" if is_lite else "HNSW")


def check_collection_name(name: str) -> None:
    """Raise ValueError unless Milvus allows a collection of that name.

    Milvus Lite allows more names than servers do.
    """
    if len(name) > 255 or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            f"{name!r} is not a collection's name: Milvus allows ASCII letters, digits and underscores, no digit "
            "first, at most 255 characters."
        )


class MilvusCollection:
    """A collection of Milvus: where it is, what it was made with, and its index.

    Args:
        uri: the knowledge base, as for [`MilvusAddress`], or such an address with token, database,
            TLS and timeout.
        collection_name: the collection's name. `create` makes it, `open` expects it.
        search_params: the index's search parameters, such as {"ef": 128}. Those that are not named
            keep the values that the index was made with.

    Raises:
        KnowledgeBaseError: the knowledge base cannot be opened; see [`MilvusConnection`].
        ValueError: Milvus allows no collection of that name.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str] | MilvusAddress | None,
        collection_name: str,
        *,
        search_params: Mapping[str, int] | None = None,
    ) -> None:
        address = MilvusAddress.of(uri)
        if address.path is None or not os.path.exists(address.path):  # Milvus Lite files may hold other names
            check_collection_name(collection_name)
        self.collection_name = collection_name
        self.connection = MilvusConnection(address)
        self._given_search_params = dict(search_params or {})
        self._index: IndexSettings | None = None
        self._dtype: np.dtype | None = None
        self._layout: Identity | None = None

    def __getstate__(self) -> dict[str, Any]:
        # they may have changed when it is unpickled
        return {**self.__dict__, "_index": None, "_dtype": None, "_layout": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.where})"

    @property
    def where(self) -> str:
        """The collection's name and address, for messages."""
        return f"collection {self.collection_name!r} at {self.connection.uri}"

    @classmethod
    def open(
        cls: type[Self],
        uri: str | os.PathLike[str] | MilvusAddress | None,
        collection_name: str,
        *,
        search_params: Mapping[str, int] | None = None,
    ) -> Self:
        """Open a knowledge base that exists; arguments as for the class.

        Raises:
            KnowledgeBaseError: there is no such file, or no such collection in it.
        """
        address = MilvusAddress.of(uri)
        if address.path is not None and not os.path.exists(address.path):
            raise KnowledgeBaseError(no_file(str(address.uri)))
        store = cls(address, collection_name, search_params=search_params)
        try:
            if not store.exists():
                there = ", ".join(map(repr, sorted(store.connection.list_collections()))) or "none"
                raise KnowledgeBaseError(f"There is no {store.where}; collections there: {there}.")
        except BaseException:
            store.close()
            raise
        return store

    def exists(self) -> bool:
        """Return True if the collection is there, and load it: only a loaded one can be read."""
        if not self.connection.has_collection(self.collection_name):
            return False
        self._build_indexes()  # those of a process that was killed before it had built them
        if self.connection.owns_file:  # rows that a killed process left in the log are slow to search
            self.flush()
        self._load()
        return True

    def _load(self) -> None:
        self.connection.load_collection(self.collection_name)

    def create(self, identity: Identity, new: NewCollection | None = None) -> None:
        """Make the collection; one that another process has just made is left as it is.

        Args:
            identity: the tokenizer, embedding model, search and chunk size of its rows.
            new: its index and type of vectors.

        Raises:
            KnowledgeBaseError: the server does not know the index, the type, search by words or the
                analyzer.
            ValueError: the index's parameters do not suit the dimension, or Milvus allows no
                collection of that name.
        """
        new = new or NewCollection()
        check_collection_name(self.collection_name)
        is_lite, version = self.connection.is_lite, self.connection.version
        if new.vector_dtype != "float32" and (is_lite or version < HALF_SINCE):
            raise KnowledgeBaseError(
                f"{new.vector_dtype} vectors need a Milvus server 2.4 or newer; at {self.connection.uri} is "
                f"{'Milvus Lite' if is_lite else 'version ' + '.'.join(map(str, version))}. Use float32."
            )
        if identity.analyzer is not None:
            check_analyzer(identity.analyzer, self.where, is_lite=is_lite, version=version)
        properties = {IDENTITY: identity.to_json(), REVISION: "0"}
        if identity.embedding_dimension is not None:
            settings = new.index_settings(is_lite=is_lite)
            settings.check(self.where, is_lite=is_lite, version=version, dimension=identity.embedding_dimension)
            properties[INDEX] = _index_json(settings, automatic=new.index is None)
        elif new.index is not None or new.vector_dtype != "float32":
            raise ValueError(
                f"{self.where} has no vectors, as it is searched by words. Leave out their index and type."
            )
        schema = collection_schema(identity, new.vector_dtype)
        try:
            self.connection.create_collection(self.collection_name, schema, properties)
            self._build_indexes()
            self._load()
        except KnowledgeBaseError:
            # if two ingestions start at once, one of them makes it, which may take a moment
            appears = Retrying(
                retry=retry_if_result(lambda is_there: not is_there),
                stop=stop_after_delay(APPEAR_SECONDS),
                wait=wait_random(0, 0.2),
                retry_error_callback=lambda state: False,
            )
            if not appears(self.exists):
                raise

    def _properties(self) -> dict[str, str]:
        return self.connection.describe_collection(self.collection_name).get("properties", {})

    def identity(self) -> Identity:
        """Return the identity that the collection was made with.

        Raises:
            KnowledgeBaseError: it has none (another program made it), or a damaged one.
        """
        description = self.connection.describe_collection(self.collection_name)
        stored = description.get("properties", {}).get(IDENTITY) or description.get("description")
        if not stored:
            raise KnowledgeBaseError(f"{self.where} has no identity: it was not made by `python -m retrieval ingest`.")
        return Identity.from_json(stored, self.where)

    def index(self) -> IndexSettings:
        """Return the index and its parameters."""
        if self._index is None:
            stored = json.loads(self._properties().get(INDEX, '{"kind": "FLAT"}'))
            stored.pop("automatic", None)
            self._index = IndexSettings.of(stored.pop("kind"), stored | self._given_search_params)
        return self._index

    def _build_indexes(self) -> None:
        """Build the indexes that are missing: that of the vectors and that of the words."""
        identity = self.identity()
        there = self.connection.list_indexes(self.collection_name)
        if identity.embedding_dimension is not None and VECTORS not in there:
            settings = self.index()
            self._build_index(VECTORS, settings.kind, "IP", settings.build_params(identity.embedding_dimension))
        if identity.has_words and WORDS not in there:
            self._build_index(WORDS, BM25_INDEX, "BM25", BM25_PARAMS)

    def _build_index(self, column: str, kind: str, metric: str, build: Mapping[str, float]) -> None:
        params = MilvusClient.prepare_index_params()
        # pymilvus sends each parameter by itself, Milvus Lite reads those that lie in "params"
        sent = {"params": dict(build)} if self.connection.is_lite else dict(build)
        params.add_index(column, index_type=kind, metric_type=metric, params=sent)
        try:
            # Milvus Lite builds when the collection is loaded: there is nothing to wait for
            self.connection.create_index(self.collection_name, params, wait=not self.connection.is_lite)
        except KnowledgeBaseError:
            if column not in self.connection.list_indexes(self.collection_name):  # no other process has built it
                raise

    def reindex(self, settings: IndexSettings, *, automatic: bool = False) -> None:
        """Build another index over the same rows; nothing is embedded again.

        Searches wait meanwhile.

        Args:
            automatic: nobody asked for this index, so another one may replace it later.

        Raises:
            KnowledgeBaseError: the server does not know it; the old one then stays. Or there are no
                vectors.
            ValueError: its parameters do not suit the dimension.
        """
        dimension = self.identity().embedding_dimension
        if dimension is None:
            raise KnowledgeBaseError(
                f"{self.where} has no vectors, as it is searched by words. Its one index, {BM25_INDEX}, stays."
            )
        settings.check(
            self.where, is_lite=self.connection.is_lite, version=self.connection.version, dimension=dimension
        )
        self.flush()
        self._drop_index()
        # recorded first: a process that finds the collection without an index builds this one
        index = _index_json(settings, automatic=automatic)
        self.connection.alter_properties(self.collection_name, {INDEX: index})
        self._index = settings
        self._build_indexes()
        self._load()

    def _drop_index(self) -> None:
        """Release the collection and drop its index; retry if a search reloads it in between."""
        retrying = Retrying(
            # Milvus's own words, which name no collection
            retry=retry_if_exception(lambda error: "loaded" in str(error.__cause__)),
            stop=stop_after_delay(self.connection.timeout),
            wait=wait_random(0, 0.2),
            reraise=True,
        )
        for attempt in retrying:
            with attempt:
                self.connection.release_collection(self.collection_name)
                self.connection.drop_index(self.collection_name, VECTORS)

    def adapt_index(self) -> None:
        """On Milvus Lite, build the index that suits the size, unless one was asked for.

        If several processes fill a file, the one that owns it does this. On a server nobody does,
        since others search meanwhile.
        """
        if not self.connection.owns_file or not json.loads(self._properties().get(INDEX, "{}")).get("automatic"):
            return  # asked for, or there are no vectors
        better = recommend(self.count(), is_lite=True)
        if better.kind != self.index().kind:
            self.reindex(better, automatic=True)

    def count(self, expression: str = "") -> int:
        """Return how many rows a search can see, of those that match a filter expression."""
        (total,) = self.connection.query(self.collection_name, expression, ["count(*)"])
        return int(total["count(*)"])

    def vector_dtype(self) -> np.dtype:
        """Return the type in which vectors are stored."""
        if self._dtype is None:
            description = self.connection.describe_collection(self.collection_name)
            fields = {field["name"]: field["type"] for field in description["fields"]}
            name = next(name for name, kind in VECTOR_TYPES.items() if kind == fields[VECTORS])
            if name == "bfloat16":
                import ml_dtypes

                self._dtype = np.dtype(ml_dtypes.bfloat16)
            else:
                self._dtype = np.dtype(name)
        return self._dtype

    def analyzer(self) -> Analyzer | None:
        """Return how text is cut into words; None if the collection is not searched by words."""
        if self._layout is None:
            self._layout = self.identity()
        return self._layout.analyzer

    def flush(self) -> None:
        """Flush pending writes to disk."""
        self.connection.flush(self.collection_name)

    def touch(self, sources: Iterable[str] = ()) -> str:
        """Record that rows have changed, so that retrievers forget remembered neighbors.

        Args:
            sources: names of the sources that the rows came from.

        Returns:
            the new `revision()`.
        """
        revision = f"{time.time_ns()}"
        properties = {REVISION: revision}
        names = set(self.sources())
        if new := set(sources) - names:
            properties[SOURCES] = json.dumps(sorted(names | new)[:MAX_SOURCES])
        self.connection.alter_properties(self.collection_name, properties)
        return revision

    def revision(self) -> str:
        """Return a value that changes whenever this library has changed rows."""
        return self._properties().get(REVISION, "")

    def sources(self) -> list[str]:
        """Return the names of its documents' sources, the first hundred."""
        return json.loads(self._properties().get(SOURCES, "[]"))

    def health(self) -> dict[str, str | int]:
        """Return the size, the index and its state, the load state, and the server's version."""
        identity, facts, waiting = self.identity(), {}, 0
        if identity.has_vectors:
            settings, index = self.index(), self.connection.describe_index(self.collection_name, VECTORS)
            waiting += int(index.get("pending_index_rows") or 0)
            facts["vectors"] = self.vector_dtype().name
            facts["index"] = _index_text(index["index_type"], {**settings.build, **settings.search})
        if identity.has_words:
            index = self.connection.describe_index(self.collection_name, WORDS)
            waiting += int(index.get("pending_index_rows") or 0)
            facts["index of words"] = _index_text(index["index_type"], BM25_PARAMS)
        state = self.connection.load_state(self.collection_name)
        lite = "Milvus Lite " if self.connection.is_lite else "Milvus "
        return {
            "chunks": self.count(),
            **facts,
            "index state": f"{waiting} rows to go" if waiting else "complete",
            "loaded": "yes" if state == "Loaded" else state,
            "server": lite + ".".join(map(str, self.connection.version)),
        }

    def close(self) -> None:
        """Close the connection; see [`MilvusConnection.close`]."""
        self.connection.close()


def _index_json(settings: IndexSettings, *, automatic: bool) -> str:
    """Return the text that `MilvusCollection.index` reads.

    `automatic` says that nobody asked for this index.
    """
    return json.dumps({"kind": settings.kind, **settings.build, **settings.search, "automatic": automatic})


def _index_text(kind: str, parameters: Mapping[str, float]) -> str:
    """Return an index with its parameters, for people."""
    named = ", ".join(f"{name} {value}" for name, value in parameters.items())
    return f"{kind} ({named})" if named else kind
