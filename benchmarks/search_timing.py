"""Time ways to search, in turns in one process: ingestion, queries, and the size of a row."""

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from machine import spread
from search_rows import COLLECTION, Row
from splits import Split

from retrieval import BulkTokenizer, Document, MilvusRetriever, MilvusStore, chunk_documents, ingest

BATCH, BATCHES, SINGLES = 64, 4, 32  # queries in a batch, batches and single queries in a round
K = 4  # neighbors of a query
MEASURES = ("chunks/s", "ms a query in a batch of 64", "ms a query alone", "bytes a row")
Timings = dict[str, dict[str, list[float]]]  # by row and measure, a number for each round


def time_rows(
    rows: Sequence[Row], split: Split, tokenizer: BulkTokenizer, chunk_size: int, chunks: int, rounds: int
) -> Timings:
    """Time every row in each round; each round begins with another row.

    An ingestion reads documents from memory and writes a new collection for this search alone. Its
    embedding model is loaded before. Queries are chunks of held-out sequences.

    Args:
        chunks: ingest documents of this many chunks, or a few more.
    """
    documents = first_documents(split.knowledge, tokenizer, chunk_size, chunks)
    queries = split.held_out.reshape(-1, chunk_size).tolist()
    timings: Timings = {row.name: {measure: [] for measure in MEASURES} for row in rows}
    for number in range(rounds):
        for row in itertools.islice(itertools.cycle(rows), number % len(rows), number % len(rows) + len(rows)):
            with tempfile.TemporaryDirectory() as folder:
                values = time_row(row, Path(folder) / "kb.db", documents, queries, tokenizer, chunk_size)
            for measure, value in zip(MEASURES, values, strict=True):
                timings[row.name][measure].append(value)
            print(f"round {number + 1}, {row.name}: " + ", ".join(f"{value:.1f}" for value in values), flush=True)
    return timings


def first_documents(documents: list[Document], tokenizer: BulkTokenizer, size: int, chunks: int) -> list[Document]:
    """Return the first documents that have that many chunks in all, or all."""
    taken, total = [], 0
    for document in documents:
        if total >= chunks:
            break
        taken.append(document)
        total += sum(1 for _ in chunk_documents([document], tokenizer, size))
    return taken


def time_row(
    row: Row, file: Path, documents: list[Document], queries: list[list[int]], tokenizer: BulkTokenizer, size: int
) -> tuple[float, float, float, float]:
    """Return a row's measures, in the order of `MEASURES`."""
    embedder = row.embedder()
    if embedder is not None:
        embedder.encode([document.text[:200] for document in documents[:BATCH]])  # warm
    store = MilvusStore(str(file), COLLECTION)
    try:
        seconds = ingest(documents, store, tokenizer, embedder, search=row.search, chunk_size=size).seconds
        stored = store.count()
    finally:
        store.close()
    retriever = row.open(file, tokenizer, K, embedder)
    try:
        retriever.retrieve(queries[-1:])  # loads the collection
        asked = itertools.cycle(queries)
        batches = [list(itertools.islice(asked, BATCH)) for _ in range(BATCHES)]
        singles = [list(itertools.islice(asked, 1)) for _ in range(SINGLES)]
        in_batch, alone = (1000 * seconds_a_query(retriever, some) for some in (batches, singles))
    finally:
        retriever.close()
    return stored / seconds, in_batch, alone, disk_bytes(file) / stored


def seconds_a_query(retriever: MilvusRetriever, batches: list[list[list[int]]]) -> float:
    """Return the mean seconds that a query takes in batches."""
    began = time.perf_counter()
    for batch in batches:
        retriever.retrieve(batch)
    return (time.perf_counter() - began) / sum(map(len, batches))


def disk_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def cost_table(timings: Timings) -> Iterator[str]:
    """Yield the lines of the table of costs, in Markdown: median, least and most."""
    yield "| search | " + " | ".join(MEASURES) + " |"
    yield "|---|" + "---|" * len(MEASURES)
    for name, measures in timings.items():
        yield f"| {name} | " + " | ".join(spread(measures[measure]) for measure in MEASURES) + " |"
