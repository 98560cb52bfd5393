"""Ingestion: documents → chunks → embeddings → rows of the collection; run again, it does only what is missing."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from tqdm.auto import tqdm

from .chunking import Document, check_chunk_size, document_batches, split_tokens
from .embedding import Embedder
from .identity import Identity
from .store import MilvusStore, content_hash, primary_key
from .tokenization import BulkTokenizer


@dataclass
class IngestReport:
    """What an ingestion did: counts, and seconds from start to end."""

    documents: int = 0
    empty_documents: int = 0
    chunks_written: int = 0
    chunks_unchanged: int = 0
    chunks_deleted: int = 0
    seconds: float = 0.0


def ingest(
    documents: Iterable[Document],
    store: MilvusStore,
    tokenizer: BulkTokenizer,
    embedder: Embedder,
    *,
    chunk_size: int = 64,
    progress: bool = False,
) -> IngestReport:
    """Bring documents into a collection, which is made if it is not there.

    Documents are taken as they come, some million characters at a time. A chunk that is there already is not embedded
    again, and chunks that a changed document no longer has are deleted. Rows are written before stale ones go, under keys
    that depend on the document alone, so an ingestion that was killed is completed by running it again.

    Args:
        progress: show a progress bar, in chunks.

    Raises:
        IdentityMismatch: the collection was made with another tokenizer, embedding model or chunk size.
        KnowledgeBaseError: Milvus failed, and went on failing when tried again.
        ValueError: chunk_size or a document id out of its range.
    """
    check_chunk_size(chunk_size)
    started = time.monotonic()
    if store.exists():
        store.identity().check(store.where, tokenizer=tokenizer, embedder=embedder, chunk_size=chunk_size)
    else:
        store.create(Identity.of(tokenizer, embedder, chunk_size))
    report = IngestReport()
    with tqdm(unit=" chunks", desc="ingest", disable=not progress) as bar:
        for batch in document_batches(documents):
            _ingest_batch(batch, store, tokenizer, embedder, chunk_size, report, bar)
    store.flush()
    report.seconds = time.monotonic() - started
    return report


def _ingest_batch(
    batch: list[Document],
    store: MilvusStore,
    tokenizer: BulkTokenizer,
    embedder: Embedder,
    chunk_size: int,
    report: IngestReport,
    bar: tqdm,
) -> None:
    latest = {document.id: document for document in batch}  # of an id given twice, the last text counts
    there = store.chunks_of(latest)
    chunks = []
    for document, tokens in zip(
        latest.values(), tokenizer.encode_batch([d.text for d in latest.values()]), strict=True
    ):
        report.empty_documents += not tokens
        chunks += split_tokens(document.id, tokens, chunk_size)
    keys = [primary_key(chunk.doc_id, chunk.index) for chunk in chunks]
    new = [chunk for key, chunk in zip(keys, chunks, strict=True) if there.get(key) != content_hash(chunk)]
    # slices, so that an interruption loses seconds of embedding and not minutes
    for start in range(0, len(new), 512):
        part = new[start : start + 512]
        store.upsert(part, embedder.encode([tokenizer.decode(chunk.tokens) for chunk in part]))
        bar.update(len(part))
    stale = sorted(set(there) - set(keys))
    store.delete(stale)
    report.documents += len(batch)
    report.chunks_written += len(new)
    report.chunks_unchanged += len(chunks) - len(new)
    report.chunks_deleted += len(stale)
