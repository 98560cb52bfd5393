"""Ingestion: documents → chunks → embeddings → rows; run again, it adds what is missing.

Three things happen at once. One thread reads, tokenizes and looks up existing rows. The caller's
thread embeds, which takes by far the most time. Another thread writes. Each is at most one window
of chunks ahead of the next.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from .analyzers import Analyzer
from .chunking import CHUNK_SIZE, Chunk, Document, check_chunk_size, document_batches, source_names, split_tokens
from .collection import NewCollection
from .embedding import BATCH_SIZE, Embedder
from .identity import Identity
from .rows import content_hash, doc_key, primary_key
from .store import MilvusStore
from .tokenization import BulkTokenizer

WINDOW = 4096  # chunks that are sorted by length together, so that batches have little padding
BATCHES_PER_WRITE = 16  # embedding batches: an interruption loses seconds of work
UNWRITTEN = 4  # writes that may wait for Milvus
MAX_NEW_IDS = 500_000  # ids that are remembered as new, some 40 MB


@dataclass
class IngestReport:
    """The counts of an ingestion, and its duration in seconds."""

    documents: int = 0
    empty_documents: int = 0
    chunks_written: int = 0
    chunks_unchanged: int = 0
    chunks_deleted: int = 0
    seconds: float = 0.0

    def add(self, other: "IngestReport") -> None:
        """Add the counts of a part."""
        self.documents += other.documents
        self.empty_documents += other.empty_documents
        self.chunks_written += other.chunks_written
        self.chunks_unchanged += other.chunks_unchanged
        self.chunks_deleted += other.chunks_deleted


@dataclass
class Window:
    """A few thousand chunks on their way from the documents to the collection.

    Attributes:
        new: the chunks to embed and write, each with its text.
        stale: keys of the rows to delete once those are written.
        doc_ids: ids of the window's documents.
        sources: names of their sources, from their metadata.
        report: the window's counts.
        settle: read no further before this window is written.
    """

    new: list[tuple[str, Chunk]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    doc_ids: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)
    report: IngestReport = field(default_factory=IngestReport)
    settle: bool = False


def ingest(
    documents: Iterable[Document],
    store: MilvusStore,
    tokenizer: BulkTokenizer,
    embedder: Embedder | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
    search: str | None = None,
    analyzer: str | Analyzer | None = None,
    new: NewCollection | None = None,
    progress: bool = False,
) -> IngestReport:
    """Write documents into a collection, which is made if it is missing.

    Documents are read one after the other, in bounded memory. A chunk that exists already is not
    embedded again. Chunks that a changed document no longer has are deleted. If an id is given
    twice, its last text counts. Rows are written before stale ones are deleted, under keys that
    depend on the document alone, so running it again completes an ingestion that was killed.

    Args:
        documents: any iterable; another thread reads it.
        embedder: the embedding model; None for search by words alone.
        chunk_size: tokens in a chunk.
        search: what the collection can be searched by: "dense" (embeddings), "bm25" (words) or
            "hybrid" (both). Default: that of the collection, "dense" for a new one.
        analyzer: how Milvus cuts text into words, as for [`parse_analyzer`].
        new: how the collection is made, if it is not there.
        progress: show a progress bar, in chunks.

    Raises:
        IdentityMismatch: the collection was made with another tokenizer, embedding model, search,
            analyzer or chunk size.
        KnowledgeBaseError: Milvus failed, also when retried, or does not know the index, vectors or
            analyzer.
        ValueError: chunk_size or a document id is out of its range, or the search does not go
            together with the embedding model or the analyzer.
    """
    started = time.monotonic()
    if embedder is not None and store.exists():
        embedder = embedder.for_collection(store.identity().embedding_settings)
    open_collection(store, tokenizer, embedder, chunk_size, new, search=search, analyzer=analyzer)
    # Milvus Lite hides rows on their way from memory to disk: look up or write, not both at once
    turn = threading.Lock()
    newcomers = _Newcomers(store)

    def there(doc_ids: Iterable[str]) -> dict[str, int]:
        with turn:
            return {} if newcomers.are_new(doc_ids) else store.chunks_of(doc_ids)

    def write(chunks: list[Chunk], embeddings: np.ndarray | None, texts: list[str]) -> None:
        with turn:
            store.upsert(chunks, embeddings, texts)

    def finish(window: Window) -> None:
        with turn:
            store.delete(window.stale)
            if window.new or window.stale:
                newcomers.touch(window.sources)

    windows = read_windows(documents, tokenizer, chunk_size, there)
    report = embed_windows(windows, embedder, write, finish, progress=progress)
    store.flush()
    store.adapt_index()
    report.seconds = time.monotonic() - started
    return report


class _Newcomers:
    """Tell which documents cannot have rows yet, because a look-up reads the whole collection.

    In a collection that was empty and that nobody else writes to, these are the ids that have not
    come before. Each process announces its documents before it writes them. Once another one has
    done so, or too many ids have come, no document is known as new.

    Args:
        store: the collection, before anything is written.
    """

    def __init__(self, store: MilvusStore) -> None:
        self._store = store
        self._revision = store.revision()
        self._seen: set[int] | None = None if store.count() else set()

    def are_new(self, doc_ids: Iterable[str]) -> bool:
        """Return True if none of these documents has rows. From now on all of them may have."""
        self._check_revision()
        if self._seen is None:
            return False
        keys = set(map(doc_key, doc_ids))
        new = self._seen.isdisjoint(keys)
        self._seen |= keys
        if len(self._seen) > MAX_NEW_IDS:
            self._seen = None
        if new:
            self.touch(())  # others look up from now on
        return new

    def touch(self, sources: Iterable[str]) -> None:
        """Record that rows have changed, as `store.touch` does."""
        self._check_revision()
        self._revision = self._store.touch(sources)

    def _check_revision(self) -> None:
        if self._seen is not None and self._store.revision() != self._revision:
            self._seen = None


def documents_of_rank(documents: Iterable[Document], rank: int, processes: int) -> Iterator[Document]:
    """Yield this process's share of the documents when several processes read the same sources.

    The id decides, so no document is taken twice or left out, and one process takes all texts of an
    id in their order.
    """
    return (document for document in documents if doc_key(document.id) % processes == rank)


def open_collection(
    store: MilvusStore,
    tokenizer: BulkTokenizer,
    embedder: Embedder | None,
    chunk_size: int,
    new: NewCollection | None = None,
    *,
    search: str | None = None,
    analyzer: str | Analyzer | None = None,
) -> None:
    """Make the collection, or check that the one that is there has the same identity.

    Args:
        new: how the collection is made, if it is not there.
        search, analyzer: as for [`ingest`].

    Raises:
        IdentityMismatch: it was made with another tokenizer, embedding model, search, analyzer or
            chunk size.
        ValueError: chunk_size is out of its range, or the search does not go together with the
            embedding model or the analyzer.
    """
    check_chunk_size(chunk_size)
    if store.exists():
        search = search or store.identity().search
        if analyzer is None and search != "dense":
            analyzer = store.analyzer()
    mine = Identity.of(tokenizer, embedder, chunk_size, search or "dense", analyzer)
    if not store.exists():
        store.create(mine, new)
    store.identity().check(
        store.where,
        tokenizer=tokenizer,
        embedder=embedder,
        chunk_size=chunk_size,
        search=mine.search,
        analyzer=mine.analyzer,
    )


def read_windows(
    documents: Iterable[Document],
    tokenizer: BulkTokenizer,
    chunk_size: int,
    there: Callable[[Iterable[str]], dict[str, int]],
    size: int = WINDOW,
) -> Iterator[Window]:
    """Yield the work window by window, each of at least `size` new chunks or documents.

    Args:
        there: a function from document ids to the primary key and content hash of their rows.
        size: the least number of chunks or documents in a window.
    """
    window = Window()
    # ids of this window, of the one being embedded, and of those whose writes may still wait
    recent = deque([window.doc_ids], maxlen=UNWRITTEN + 2)
    for batch in document_batches(documents):
        latest = {document.id: document for document in batch}
        if any(not latest.keys().isdisjoint(ids) for ids in recent):
            # a document's rows are known only after its earlier text is written
            window.settle = True
            yield window
            window = Window()
            recent.clear()
            recent.append(window.doc_ids)
        _add_documents(window, latest, tokenizer, chunk_size, there(latest))
        window.report.documents += len(batch)
        if len(window.new) >= size or len(window.doc_ids) >= size:
            yield window
            window = Window()
            recent.append(window.doc_ids)
    yield window


def _add_documents(
    window: Window, documents: dict[str, Document], tokenizer: BulkTokenizer, chunk_size: int, there: dict[str, int]
) -> None:
    keys = set()
    texts = [document.text for document in documents.values()]
    for document, tokens in zip(documents.values(), tokenizer.encode_batch(texts), strict=True):
        window.report.empty_documents += not tokens
        for chunk in split_tokens(document, tokens, chunk_size):
            key = primary_key(chunk.doc_id, chunk.index)
            keys.add(key)
            if key in there and there[key] == content_hash(chunk):
                window.report.chunks_unchanged += 1
            else:
                window.report.chunks_written += 1
                window.new.append((tokenizer.decode_text(chunk.tokens), chunk))
    stale = there.keys() - keys
    window.stale += sorted(stale)
    window.report.chunks_deleted += len(stale)
    window.doc_ids.update(documents)
    window.sources |= source_names(documents.values())


def embed_windows(
    windows: Iterator[Window],
    embedder: Embedder | None,
    write: Callable[[list[Chunk], np.ndarray | None, list[str]], None],
    finish: Callable[[Window], None],
    *,
    progress: bool = False,
) -> IngestReport:
    """Embed all windows in the caller's thread while others read the next and write the last.

    Args:
        embedder: the embedding model; None if nothing is embedded.
        write: called in order, in one other thread, with chunks, their embeddings (n, dimension) or
            None, and their texts.
        finish: called there when all chunks of a window are written.

    Returns:
        the counts of all finished windows.

    Raises:
        Exception: as raised by `windows`, `write` or `finish`; written rows stay.
    """
    report = IngestReport()
    unwritten: deque[Future] = deque()

    def close(window: Window, writes: list[Future]) -> None:
        for done in writes:
            done.result()  # raises if one failed: stale rows stay until the new ones are there
        finish(window)
        report.add(window.report)

    def settle(pending: int) -> None:
        while len(unwritten) > pending:
            unwritten.popleft().result()

    with (
        tqdm(unit=" chunks", desc="ingest", disable=not progress) as bar,
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(1, "write") as writing,
    ):
        try:
            ahead = reading.submit(next, windows, None)
            while (window := ahead.result()) is not None:
                if not window.settle:
                    ahead = reading.submit(next, windows, None)
                writes = []
                window.new.sort(key=lambda item: -len(item[0]))
                step = (BATCH_SIZE if embedder is None else embedder.batch_size) * BATCHES_PER_WRITE
                for start in range(0, len(window.new), step):
                    part = window.new[start : start + step]
                    texts, chunks = [text for text, _ in part], [chunk for _, chunk in part]
                    embeddings = None if embedder is None else embedder.encode(texts)
                    writes.append(writing.submit(write, chunks, embeddings, texts))
                    unwritten.append(writes[-1])
                    settle(UNWRITTEN)
                    bar.update(len(chunks))
                unwritten.append(writing.submit(close, window, writes))
                settle(0 if window.settle else UNWRITTEN)
                if window.settle:
                    ahead = reading.submit(next, windows, None)
            settle(0)
        except BaseException:
            writing.shutdown(cancel_futures=True)
            raise
    return report
