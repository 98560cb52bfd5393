"""The rows of a collection: keys, hashes and columns."""

from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient
from pymilvus.orm.schema import CollectionSchema

from .chunking import MAX_ID_BYTES, Chunk
from .filters import MAX_FIELDS, tags
from .hashing import hash64, sha256
from .identity import Identity

VECTOR_TYPES = {
    "float32": DataType.FLOAT_VECTOR,
    "float16": DataType.FLOAT16_VECTOR,
    "bfloat16": DataType.BFLOAT16_VECTOR,
}


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


def row_of(chunk: Chunk, embedding: np.ndarray) -> dict[str, Any]:
    """Return the row of a chunk with its embedding (dimension,)."""
    return {
        "pk": primary_key(chunk.doc_id, chunk.index),
        "doc_id": chunk.doc_id,
        "doc_key": doc_key(chunk.doc_id),
        "chunk_index": chunk.index,
        "content_hash": content_hash(chunk),
        "tokens": list(chunk.tokens),
        "continuation": list(chunk.continuation),
        "metadata": dict(chunk.metadata),
        "tags": tags(chunk.metadata),
        "embedding": embedding,
    }


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
    schema.add_field("embedding", VECTOR_TYPES[vector_dtype], dim=identity.embedding_dimension)
    return schema
