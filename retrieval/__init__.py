"""RETRO's knowledge base: text → chunks → vectors → Milvus, and neighbors back."""

from .chunking import Chunk, Document, chunk_documents
from .embedding import DEFAULT_EMBEDDING_MODEL, Embedder
from .errors import IdentityMismatch, KnowledgeBaseError
from .identity import Identity
from .ingestion import IngestReport, ingest
from .retriever import MilvusRetriever, Neighbors
from .sources import documents_from_rows, read_documents
from .store import MilvusStore
from .tokenization import BulkTokenizer

__all__ = [
    "DEFAULT_EMBEDDING_MODEL",
    "BulkTokenizer",
    "Chunk",
    "Document",
    "Embedder",
    "Identity",
    "IdentityMismatch",
    "IngestReport",
    "KnowledgeBaseError",
    "MilvusRetriever",
    "MilvusStore",
    "Neighbors",
    "chunk_documents",
    "documents_from_rows",
    "ingest",
    "read_documents",
]
