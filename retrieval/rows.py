"""The rows of a collection: keys, hashes and columns."""

from typing import Any

import numpy as np
from pymilvus import DataType, Function, FunctionType, MilvusClient
from pymilvus.orm.schema import CollectionSchema

from .analyzers import MAX_TEXT_BYTES, Analyzer, milvus_params, searched_text
from .chunking import MAX_ID_BYTES, Chunk
from .filters import MAX_FIELDS, tags
from .hashing import hash64, sha256
from .identity import Identity

VECTOR_TYPES = {
    "float32": DataType.FLOAT_VECTOR,
    "float16": DataType.FLOAT16_VECTOR,
    "bfloat16": DataType.BFLOAT16_VECTOR,
}
VECTORS = "embedding"  # the column of vectors, and the name of its index
TEXT, WORDS = "text", "words"  # the column of texts, and that of their words, the name of its index


def doc_key(doc_id: str) -> int:
    """Return 64 bits of a document id's hash, signed.

    Filters name documents by it, so that no id is ever part of an expression.
    """
    return hash64(doc_id)


def primary_key(doc_id: str, chunk_index: int) -> str:
    """Return the key of a document's chunk; writing the chunk twice leaves one row."""
    return f"{sha256(doc_id).hex()[:32]}-{chunk_index}"


def content_hash(chunk: Chunk) -> int:
    """Return a hash of the chunk's tokens, its continuation and the document's metadata."""
    return hash64(repr((list(chunk.tokens), list(chunk.continuation), sorted(chunk.metadata.items()))))


def row_of(
    chunk: Chunk, embedding: np.ndarray | None, text: str | None = None, analyzer: Analyzer | None = None
) -> dict[str, Any]:
    """Return the row of a chunk.

    Args:
        embedding: (dimension,), or None in a collection without embeddings.
        text: the chunk's text, if the collection is searched by words with this analyzer.
    """
    row = {
        "pk": primary_key(chunk.doc_id, chunk.index),
        "doc_id": chunk.doc_id,
        "doc_key": doc_key(chunk.doc_id),
        "chunk_index": chunk.index,
        "content_hash": content_hash(chunk),
        "tokens": list(chunk.tokens),
        "continuation": list(chunk.continuation),
        "metadata": dict(chunk.metadata),
        "tags": tags(chunk.metadata),
    }
    if embedding is not None:
        row[VECTORS] = embedding
    if analyzer is not None:
        if text is None:
            raise ValueError(f"Chunk {chunk.index} of {chunk.doc_id!r} has no text to search by words. Give texts.")
        row[TEXT] = searched_text(text, analyzer)
    return row


def collection_schema(identity: Identity, vector_dtype: str = "float32") -> CollectionSchema:
    """Return the columns of a knowledge base."""
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=identity.to_json())
    schema.add_field("pk", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("doc_id", DataType.VARCHAR, max_length=MAX_ID_BYTES)
    schema.add_field("doc_key", DataType.INT64)
    schema.add_field("chunk_index", DataType.INT64)
    schema.add_field("content_hash", DataType.INT64)
    for name in ("tokens", "continuation"):
        schema.add_field(name, DataType.ARRAY, element_type=DataType.INT32, max_capacity=identity.chunk_size)
    schema.add_field("metadata", DataType.JSON)
    schema.add_field("tags", DataType.ARRAY, element_type=DataType.INT64, max_capacity=MAX_FIELDS)
    if identity.has_vectors:
        schema.add_field(VECTORS, VECTOR_TYPES[vector_dtype], dim=identity.embedding_dimension)
    if identity.analyzer is not None:
        params = milvus_params(identity.analyzer)
        schema.add_field(
            TEXT, DataType.VARCHAR, max_length=MAX_TEXT_BYTES, enable_analyzer=True, analyzer_params=params
        )
        schema.add_field(WORDS, DataType.SPARSE_FLOAT_VECTOR)
        schema.add_function(Function("bm25", FunctionType.BM25, [TEXT], [WORDS]))
    return schema
