"""Bulk files: documents → Parquet files for Milvus's bulk import, for very large loads."""

import hashlib
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .analyzers import Analyzer
from .chunking import CHUNK_SIZE, Chunk, Document, check_chunk_size
from .embedding import Embedder
from .errors import IdentityMismatch, KnowledgeBaseError
from .identity import Identity
from .ingestion import IngestReport, Window, embed_windows, read_windows
from .rows import collection_schema, content_hash, doc_key, primary_key, row_of
from .tokenization import BulkTokenizer

PART = 32_768  # chunks of a file, some 80 MB with 384 dimensions; an interruption loses one


def write_bulk_files(
    documents: Iterable[Document],
    folder: str | os.PathLike,
    tokenizer: BulkTokenizer,
    embedder: Embedder | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
    search: str = "dense",
    analyzer: str | Analyzer | None = None,
    rank: int = 0,
    progress: bool = False,
) -> IngestReport:
    """Write chunks and embeddings as Parquet files, each complete or absent.

    After an interruption, run it again with the documents in the same order: parts that exist are
    not embedded again. Parts that no longer match the documents are deleted. The files hold the
    rows of a new, empty collection; importing them does not look for existing rows.

    Args:
        folder: receives `identity.json` and `part-<rank>-<number>-<hash>.parquet`.
        embedder: the embedding model; None for search by words alone.
        chunk_size: tokens in a chunk.
        search: what the collection can be searched by: "dense", "bm25" or "hybrid".
        analyzer: how Milvus cuts text into words, as for [`parse_analyzer`].
        rank: this process's number, if several write into one folder.
        progress: show a progress bar, in chunks.

    Raises:
        KnowledgeBaseError: pymilvus' bulk writer is not installed.
        IdentityMismatch: the folder has files of another tokenizer, embedding model, search,
            analyzer or chunk size.
        ValueError: a document id comes twice: an import would keep both texts. Or the search does
            not go together with the embedding model or the analyzer.
    """
    started = time.monotonic()
    check_chunk_size(chunk_size)
    _bulk_writer()  # fails before anything is embedded
    identity = Identity.of(tokenizer, embedder, chunk_size, search, analyzer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _sign(folder, identity)
    draft = folder / f".draft-{rank}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    written: set[Path] = set()
    rows: list[dict[str, Any]] = []
    parts: list[Path] = []  # files of the windows on their way, in order

    def missing(windows: Iterator[Window]) -> Iterator[Window]:
        for number, window in enumerate(windows):
            part = folder / f"part-{rank}-{number:06d}-{_hash(window)}.parquet"
            written.add(part)
            if part.exists():
                window.report.chunks_unchanged += window.report.chunks_written
                window.report.chunks_written = 0
                window.new.clear()
            parts.append(part)
            yield window

    def write(chunks: list[Chunk], embeddings: np.ndarray | None, texts: list[str]) -> None:
        vectors = [None] * len(chunks) if embeddings is None else embeddings
        written = zip(chunks, vectors, texts, strict=True)
        rows.extend(row_of(chunk, vector, text, identity.analyzer) for chunk, vector, text in written)

    def finish(_: Window) -> None:
        part = parts.pop(0)
        if rows:
            _write_part(rows, identity, draft, part)
            rows.clear()

    with closing(sqlite3.connect(draft / "ids.sqlite", check_same_thread=False)) as ids:
        windows = missing(read_windows(_once(documents, ids), tokenizer, chunk_size, lambda _: {}, size=PART))
        report = embed_windows(windows, embedder, write, finish, progress=progress)
    shutil.rmtree(draft)
    for stale in set(folder.glob(f"part-{rank}-*.parquet")) - written:
        stale.unlink()
    report.seconds = time.monotonic() - started
    return report


def _bulk_writer() -> ModuleType:
    try:
        from pymilvus import bulk_writer
    except ImportError as error:
        raise KnowledgeBaseError("Bulk files need more packages: pip install 'transformers-retro[bulk]'.") from error
    return bulk_writer


def _sign(folder: Path, identity: Identity) -> None:
    file = folder / "identity.json"
    if file.exists():
        theirs = Identity.from_json(file.read_text(), str(folder))
        if theirs.differences(identity):
            raise IdentityMismatch(f"{folder} has files of another knowledge base; write into an empty folder.")
    else:
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(identity.to_json())
        draft.replace(file)


def _once(documents: Iterable[Document], ids: sqlite3.Connection) -> Iterator[Document]:
    """Yield the documents; refuse an id that comes again.

    Ids are kept on disk: there may be billions.
    """
    ids.executescript(
        "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE seen (key INTEGER PRIMARY KEY);"
    )
    for document in documents:
        if not ids.execute("INSERT OR IGNORE INTO seen VALUES (?)", (doc_key(document.id),)).rowcount:
            raise ValueError(
                f"The document id {document.id!r} comes twice; bulk files would keep both texts. Give each document "
                "an id of its own, or ingest without bulk files, where the last text counts."
            )
        yield document


def _hash(window: Window) -> str:
    digest = hashlib.sha256()
    for _, chunk in window.new:
        digest.update(f"{primary_key(chunk.doc_id, chunk.index)} {content_hash(chunk)}\n".encode())
    return digest.hexdigest()[:16]


def _write_part(rows: list[dict[str, Any]], identity: Identity, draft: Path, part: Path) -> None:
    pymilvus = _bulk_writer()
    for name in ("local_bulk_writer", "buffer"):  # they log every step
        logging.getLogger(f"pymilvus.bulk_writer.{name}").setLevel(logging.WARNING)
    size = 2**40  # all rows go into one file
    schema, parquet = collection_schema(identity), pymilvus.BulkFileType.PARQUET
    writer = pymilvus.LocalBulkWriter(schema, str(draft), chunk_size=size, file_type=parquet)
    for row in rows:
        writer.append_row(row)
    writer.commit()
    ((file,),) = writer.batch_files
    Path(file).replace(part)
