"""Search ever larger parts of a knowledge base, each of which holds the smaller ones.

Documents are ordered by the hash of their id, and a part has the first ones. A search by meaning
filters them by that hash: it costs nothing, and the neighbors are those of a knowledge base of only
these documents. A search by words weighs a word by its rarity in the whole collection, so a filter
would change the scores. There, the part's rows are copied into a Milvus Lite file, and nothing is
embedded again.
"""

import copy
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from retrieval import Embedder, MilvusRetriever, MilvusStore
from retrieval.connection import Row
from retrieval.filters import all_of
from retrieval.rows import VECTORS, WORDS, collection_schema
from retrieval.store import ROWS_PER_CALL


@dataclass(frozen=True)
class Part:
    """The first documents of a knowledge base, in the order of their ids' hashes.

    Attributes:
        share: the share of the chunks that was asked for.
        last_key: the last document's `doc_key`.
        documents, chunks: how many there are.
    """

    share: float
    last_key: int
    documents: int
    chunks: int

    @property
    def expression(self) -> str:
        """The filter expression that the part's rows match."""
        return f"doc_key <= {self.last_key}"


def nested_parts(store: MilvusStore, shares: Iterable[float]) -> list[Part]:
    """Return parts of a knowledge base with at least these shares of its chunks.

    Each part has whole documents.
    """
    keys, counts = np.unique([row["doc_key"] for row in store.scan(["doc_key"])], return_counts=True)
    totals = np.cumsum(counts)
    parts = []
    for share in sorted(shares):
        last = min(int(np.searchsorted(totals, share * totals[-1])), len(keys) - 1)
        parts.append(Part(share, int(keys[last]), last + 1, int(totals[last])))
    return parts


@contextmanager
def part_retriever(retriever: MilvusRetriever, part: Part) -> Iterator[MilvusRetriever]:
    """Open a retriever that finds what a knowledge base of only these documents has.

    An approximate index stays approximate.

    Args:
        retriever: of the whole knowledge base.
        part: the documents.
    """
    if retriever.search == "dense":
        filtered = copy.copy(retriever)
        filtered.expression = all_of([retriever.expression, part.expression])
        yield filtered
        return
    with tempfile.TemporaryDirectory() as folder:
        store = _copied(retriever.store, part, Path(folder) / "part.db")
        try:
            changed = changed_retriever(retriever, store=store)
            changed.expression = retriever.expression
            yield changed
        finally:
            store.close()


def changed_retriever(
    retriever: MilvusRetriever,
    *,
    store: MilvusStore | None = None,
    search: str | None = None,
    embedder: Embedder | None = None,
) -> MilvusRetriever:
    """Return a retriever with other settings; what is not given stays.

    Raises:
        KnowledgeBaseError: the collection was not built for this search.
    """
    search = search or retriever.search
    reranking: dict[str, Any] = {}
    if retriever.reranker is not None:
        reranking = {"reranker": retriever.reranker, "rerank_candidates": retriever._rows_wanted}
    return MilvusRetriever(
        store or retriever.store,
        retriever.tokenizer,
        None if search == "bm25" else embedder or retriever.embedder,
        search=search,
        num_neighbors=retriever.num_neighbors,
        neighbor_length=retriever.neighbor_length,
        **reranking,
    )


def _copied(store: MilvusStore, part: Part, file: Path) -> MilvusStore:
    """Copy a part's rows into a new Milvus Lite file, in which every search is exact."""
    identity = store.identity()
    fields = [field.name for field in collection_schema(identity).fields if field.name != WORDS]
    copied = MilvusStore(str(file), store.collection_name)
    try:
        copied.create(identity)
        page: list[Row] = []
        rows = store.scan(fields, part.expression)
        for row in tqdm(rows, total=part.chunks, desc=f"Copying {part.chunks} chunks", leave=False):
            plain = {
                name: list(row[name]) if name in ("tokens", "continuation", "tags") else row[name] for name in fields
            }
            if VECTORS in plain:
                plain[VECTORS] = store.vector(row[VECTORS])
            page.append(plain)
            if len(page) == ROWS_PER_CALL:
                copied.connection.upsert(copied.collection_name, page)
                page = []
        if page:
            copied.connection.upsert(copied.collection_name, page)
        copied.flush()
    except BaseException:
        copied.close()
        raise
    return copied
