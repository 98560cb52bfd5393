"""MilvusStore: the one collection of a knowledge base, on Milvus Lite, a server or a cluster alike."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException
from pymilvus.milvus_client import IndexParams
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from .chunking import Chunk
from .errors import KnowledgeBaseError
from .identity import Identity

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

IDENTITY = "retro.identity"
MAX_ID_BYTES = 4096  # of a document id
ROWS_PER_CALL = 500
# A Milvus Lite file is served by one embedded server a process, whatever closes a client: stores on it are counted here.
_OPEN_FILES: Counter[str] = Counter()
ATTEMPTS = 5


def doc_key(doc_id: str) -> int:
    """64 bits of a document id's hash, signed: what filters speak of, so that no id is ever part of an expression."""
    return int.from_bytes(hashlib.sha256(doc_id.encode()).digest()[:8], "big", signed=True)


def primary_key(doc_id: str, chunk_index: int) -> str:
    """The same for the same chunk of the same document, so that writing it twice leaves one row."""
    return f"{hashlib.sha256(doc_id.encode()).hexdigest()[:32]}-{chunk_index}"


def content_hash(chunk: Chunk) -> int:
    """Changes when the chunk's tokens or those that follow it change."""
    text = repr((list(chunk.tokens), list(chunk.continuation)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _drop_tracebacks(record: logging.LogRecord) -> bool:
    return record.exc_info is None


class MilvusStore:
    """Rows of a collection: a chunk, its continuation and its embedding.

    Args:
        uri: a file path ending in .db (Milvus Lite) or http(s)://host:port. Default: MILVUS_URI.
        collection_name: the collection; `create` makes it, `open` expects it.
        token: "user:password" or an API key, never shown. Default: MILVUS_TOKEN.

    Raises:
        KnowledgeBaseError: no uri; a file in use by another process; no server at the address.
    """

    def __init__(self, uri: str | os.PathLike | None, collection_name: str, *, token: str | None = None) -> None:
        uri = os.environ.get("MILVUS_URI") if uri is None else os.fspath(uri)
        if not uri:
            raise KnowledgeBaseError(
                "No knowledge base is named: give a uri (a .db file or http://…) or set MILVUS_URI."
            )
        self.uri, self.collection_name = uri, collection_name
        self.is_file = "://" not in uri
        if self.is_file and not uri.endswith(".db"):
            raise KnowledgeBaseError(f"{uri!r} is no server's address, and a Milvus Lite file must end in .db.")
        token = token or os.environ.get("MILVUS_TOKEN")
        # Milvus Lite logs a traceback of what is said in one sentence below
        embedded = logging.getLogger("milvus_lite.server_manager")
        embedded.addFilter(_drop_tracebacks)
        try:
            self.client = MilvusClient(uri, **({"token": token} if token and not self.is_file else {}))
        except (MilvusException, grpc.RpcError) as error:
            if self.is_file and Path(uri).exists():
                raise KnowledgeBaseError(
                    f"{uri} could not be opened. Milvus Lite lets one process at a time use a file: most likely another "
                    "one has it open. Wait for that one, or share the knowledge base: start a Milvus server, ingest "
                    "into it, and pass its address (http://host:19530) instead of the file."
                ) from error
            remedy = (
                "does its folder exist and may it be written?"
                if self.is_file
                else "is the server up, and the token right?"
            )
            raise KnowledgeBaseError(f"No connection to {self.address}: {remedy}") from error
        finally:
            embedded.removeFilter(_drop_tracebacks)
        self._closed = False
        if self.is_file:
            _OPEN_FILES[os.path.abspath(uri)] += 1

    def __repr__(self) -> str:
        return f"MilvusStore({self.where})"

    @property
    def where(self) -> str:
        """Names the collection in messages."""
        return f"collection {self.collection_name!r} at {self.address}"

    @property
    def address(self) -> str:
        """The uri without the user and password that it may carry."""
        scheme, separator, rest = self.uri.partition("://")
        return scheme + separator + rest.rpartition("@")[2]

    @classmethod
    def open(cls, uri: str | os.PathLike | None, collection_name: str, *, token: str | None = None) -> "MilvusStore":
        """Open a knowledge base that exists.

        Raises:
            KnowledgeBaseError: there is no such file, or no such collection in it.
        """
        path = os.environ.get("MILVUS_URI") if uri is None else os.fspath(uri)
        if path and "://" not in path and not Path(path).exists():
            raise KnowledgeBaseError(
                f"There is no knowledge base file {path}: build it with `python -m retrieval ingest`."
            )
        store = cls(uri, collection_name, token=token)
        if not store.exists():
            there = ", ".join(map(repr, sorted(store.call(store.client.list_collections)))) or "none"
            store.close()
            raise KnowledgeBaseError(f"There is no {store.where}; collections there: {there}.")
        return store

    def exists(self) -> bool:
        """Whether the collection is there; if so, it is loaded, since rows can be read from a loaded one only."""
        if not self.call(self.client.has_collection, self.collection_name):
            return False
        if not self.call(self.client.list_indexes, self.collection_name):  # killed between making it and its index
            self.call(self.client.create_index, self.collection_name, self._index())
        if self.is_file:  # rows that a killed process left in the log are searched 30 times slower than those on disk
            self.flush()
        self.call(self.client.load_collection, self.collection_name)
        return True

    def _index(self) -> IndexParams:
        index = self.client.prepare_index_params()
        if self.is_file:  # exact, and some 20 ms a search at 20,000 chunks
            index.add_index("embedding", index_type="FLAT", metric_type="IP")
        else:
            index.add_index("embedding", index_type="HNSW", metric_type="IP", params={"M": 16, "efConstruction": 200})
        return index

    def create(self, identity: Identity) -> None:
        """Make the collection, or check that the one that is there has this identity's format."""
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False, description=identity.to_json())
        schema.add_field("pk", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("doc_id", DataType.VARCHAR, max_length=MAX_ID_BYTES)
        schema.add_field("doc_key", DataType.INT64)
        schema.add_field("chunk_index", DataType.INT64)
        schema.add_field("content_hash", DataType.INT64)
        for name in ("tokens", "continuation"):
            schema.add_field(name, DataType.ARRAY, element_type=DataType.INT32, max_capacity=identity.chunk_size)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=identity.embedding_dimension)
        # Milvus Lite keeps properties and no description; the identity goes into both
        self.call(
            self.client.create_collection,
            self.collection_name,
            schema=schema,
            index_params=self._index(),
            properties={IDENTITY: identity.to_json()},
        )

    def identity(self) -> Identity:
        """The identity card that the collection was made with.

        Raises:
            KnowledgeBaseError: it has none (another program made it), or a damaged one.
        """
        description = self.call(self.client.describe_collection, self.collection_name)
        card = description.get("properties", {}).get(IDENTITY) or description.get("description")
        if not card:
            raise KnowledgeBaseError(
                f"{self.where} has no identity card: it was not made by `python -m retrieval ingest`."
            )
        return Identity.from_json(card, self.where)

    def count(self) -> int:
        """Rows that a search can see."""
        rows = self.call(
            self.client.query,
            self.collection_name,
            filter="",
            output_fields=["count(*)"],
            consistency_level="Strong",
        )
        return int(rows[0]["count(*)"])

    def chunks_of(self, doc_ids: Iterable[str]) -> dict[str, int]:
        """Primary key -> content hash of every row of these documents."""
        keys = sorted({doc_key(doc_id) for doc_id in doc_ids})
        if not keys:
            return {}
        rows = self.call(
            self.client.query,
            self.collection_name,
            filter=f"doc_key in {keys}",
            output_fields=["pk", "content_hash"],
            consistency_level="Strong",
        )
        return {row["pk"]: row["content_hash"] for row in rows}

    def upsert(self, chunks: Sequence[Chunk], embeddings: np.ndarray) -> None:
        """Write chunks with their embeddings (n, dimension); one that is there already is replaced.

        Raises:
            ValueError: a document id longer than 4096 bytes.
        """
        rows = []
        for chunk, embedding in zip(chunks, embeddings, strict=True):
            if len(chunk.doc_id.encode()) > MAX_ID_BYTES:
                raise ValueError(
                    f"The document id {chunk.doc_id[:60]!r}… is longer than {MAX_ID_BYTES} bytes of UTF-8."
                )
            rows.append(
                {
                    "pk": primary_key(chunk.doc_id, chunk.index),
                    "doc_id": chunk.doc_id,
                    "doc_key": doc_key(chunk.doc_id),
                    "chunk_index": chunk.index,
                    "content_hash": content_hash(chunk),
                    "tokens": list(chunk.tokens),
                    "continuation": list(chunk.continuation),
                    "embedding": embedding,
                }
            )
        for start in range(0, len(rows), ROWS_PER_CALL):
            self.call(self.client.upsert, self.collection_name, rows[start : start + ROWS_PER_CALL])

    def delete(self, keys: Sequence[str]) -> None:
        """Delete rows by primary key."""
        for start in range(0, len(keys), ROWS_PER_CALL):
            self.call(self.client.delete, self.collection_name, ids=list(keys[start : start + ROWS_PER_CALL]))

    def search(self, embeddings: np.ndarray, limit: int, exclude: Iterable[int] = ()) -> list[list[dict[str, Any]]]:
        """The nearest rows to each embedding (n, dimension), best first, with all that the model reads.

        Args:
            limit: rows for each, at most.
            exclude: `doc_key`s of documents to leave out.
        """
        keys = sorted(set(exclude))
        found = self.call(
            self.client.search,
            self.collection_name,
            embeddings.tolist(),
            limit=limit,
            filter=f"doc_key not in {keys}" if keys else "",
            output_fields=["doc_id", "doc_key", "chunk_index", "tokens", "continuation"],
            # sees this process's own writes at once and others' within moments; "Strong" waits 200 ms on a server
            consistency_level="Session",
        )
        return [[{**hit["entity"], "score": hit["distance"]} for hit in hits] for hits in found]

    def flush(self) -> None:
        """Have all that was written on disk."""
        self.call(self.client.flush, self.collection_name)

    def close(self) -> None:
        """Let go of the collection. After the last one on a Milvus Lite file, another process can open the file."""
        if self._closed:
            return
        self._closed = True
        self.client.close()
        if self.is_file:
            path = os.path.abspath(self.uri)
            _OPEN_FILES[path] -= 1
            if not _OPEN_FILES[path]:
                from milvus_lite.server_manager import server_manager_instance  # there is none on Windows

                server_manager_instance.release_server(self.uri)

    def call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call Milvus; try again with growing pauses, then say what failed and where.

        Raises:
            KnowledgeBaseError: it failed every time.
        """
        failures = (MilvusException, grpc.RpcError)
        retrying = Retrying(
            retry=retry_if_exception_type(failures),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=0.2, max=5),
            reraise=True,
        )
        try:
            return retrying(function, *args, **kwargs)
        except failures as error:
            reason = getattr(error, "message", None) or str(error)
            raise KnowledgeBaseError(
                f"Milvus refused {function.__name__} on {self.where}, {ATTEMPTS} times: {reason}. Check that the server is "
                "up and has disk space, and that the collection was not dropped."
            ) from error
