"""RETRO's knowledge base: text → chunks → vectors → Milvus, and neighbors back."""

from .addresses import TLS, MilvusAddress
from .bulk import write_bulk_files
from .chunking import Chunk, Document, chunk_documents
from .collection import NewCollection
from .connection import MilvusConnection
from .embedding import DEFAULT_EMBEDDING_MODEL, Embedder, EmbedderSettings
from .errors import IdentityMismatch, KnowledgeBaseError
from .exchange import export_knowledge_base, import_knowledge_base, push_knowledge_base
from .identity import Identity
from .indexes import IndexSettings
from .ingestion import IngestReport, documents_of_rank, ingest
from .neighbors import Neighbors
from .reranking import Reranker
from .retriever import MilvusRetriever
from .sources import Source, documents_from_rows, read_documents
from .store import MilvusStore
from .tokenization import BulkTokenizer
from .tokenizer_loading import load_tokenizer

__all__ = [
    "DEFAULT_EMBEDDING_MODEL",
    "TLS",
    "BulkTokenizer",
    "Chunk",
    "Document",
    "Embedder",
    "EmbedderSettings",
    "Identity",
    "IdentityMismatch",
    "IndexSettings",
    "IngestReport",
    "KnowledgeBaseError",
    "MilvusAddress",
    "MilvusConnection",
    "MilvusRetriever",
    "MilvusStore",
    "Neighbors",
    "NewCollection",
    "Reranker",
    "Source",
    "chunk_documents",
    "documents_from_rows",
    "documents_of_rank",
    "export_knowledge_base",
    "import_knowledge_base",
    "ingest",
    "load_tokenizer",
    "push_knowledge_base",
    "read_documents",
    "write_bulk_files",
]
