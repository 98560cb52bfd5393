"""MilvusRetriever: token chunks in, the neighbors that the model reads out."""

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .embedding import Embedder
from .errors import KnowledgeBaseError
from .store import MilvusStore, doc_key
from .tokenization import BulkTokenizer

logger = logging.getLogger(__name__)

# Asked for beyond k when documents are excluded: a chunk's own document mostly gives its few nearest rows.
OVERFETCH = 8


@dataclass
class Neighbors:
    """What was found for n chunks: k neighbors each, of r tokens.

    Attributes:
        ids: (n, k, r) int64; a neighbor chunk's tokens, what follows it, and 0 as padding at the end.
        attention_mask: (n, k, r) bool; False for padding and for neighbors that are not there.
        doc_ids: n lists of k document ids, None where there is no neighbor.
        chunk_indices: (n, k) int64, the chunk's number in its document, -1 where there is none.
        scores: (n, k) float32 cosine similarity, nan where there is none.
    """

    ids: torch.LongTensor
    attention_mask: torch.BoolTensor
    doc_ids: list[list[str | None]]
    chunk_indices: torch.LongTensor
    scores: torch.FloatTensor


class MilvusRetriever:
    """Finds neighbors in a collection; hand it to a model with `retriever=` or `set_retriever`.

    Args:
        store: an open collection with rows in it.
        tokenizer: the one that it was built with.
        embedder: the one that it was built with.
        num_neighbors: the paper's k.
        neighbor_length: the paper's r, tokens of a neighbor; default 2 * chunk_size, the chunk and its continuation.
        cache_size: chunks whose neighbors are remembered, for training over several epochs; 0 remembers none.
        on_retrieval_error: "raise", or "skip" to go on without neighbors (counted in `skipped_chunks`).

    Raises:
        KnowledgeBaseError: the collection is empty, or made with another tokenizer or embedding model.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        store: MilvusStore,
        tokenizer: PreTrainedTokenizerBase | BulkTokenizer,
        embedder: Embedder,
        *,
        num_neighbors: int = 2,
        neighbor_length: int | None = None,
        cache_size: int = 0,
        on_retrieval_error: str = "raise",
    ) -> None:
        self.store, self.embedder = store, embedder
        self.tokenizer = tokenizer if isinstance(tokenizer, BulkTokenizer) else BulkTokenizer(tokenizer)
        identity = store.identity()
        identity.check(store.where, tokenizer=self.tokenizer, embedder=embedder)
        self.chunk_size = identity.chunk_size
        self.vocab_size = identity.vocab_size
        self.embedding_model = identity.embedding_model
        self.tokenizer_fingerprint = identity.tokenizer_fingerprint
        self.collection_name = store.collection_name
        self.num_neighbors = num_neighbors
        self.neighbor_length = 2 * self.chunk_size if neighbor_length is None else neighbor_length
        if num_neighbors < 1:
            raise ValueError(f"num_neighbors must be at least 1, not {num_neighbors}.")
        if not 1 <= self.neighbor_length <= 2 * self.chunk_size:
            raise ValueError(
                f"neighbor_length is {neighbor_length}; the knowledge base has a chunk and its continuation, "
                f"{2 * self.chunk_size} tokens."
            )
        if on_retrieval_error not in ("raise", "skip"):
            raise ValueError(f"on_retrieval_error must be 'raise' or 'skip', not {on_retrieval_error!r}.")
        if store.count() == 0:
            raise KnowledgeBaseError(f"{store.where} is empty: ingest documents first (`python -m retrieval ingest`).")
        self.on_retrieval_error = on_retrieval_error
        self.skipped_chunks = 0
        self.cache_size = cache_size
        self._cache: OrderedDict[tuple, list[dict[str, Any]]] = OrderedDict()

    @classmethod
    def from_uri(
        cls,
        uri: str | None = None,
        collection_name: str = "retro",
        *,
        tokenizer: PreTrainedTokenizerBase | BulkTokenizer,
        embedding_model: str | None = None,
        token: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> "MilvusRetriever":
        """Open a knowledge base.

        Args:
            uri: a .db file (Milvus Lite) or http(s)://host:port; default MILVUS_URI.
            tokenizer: the model's.
            embedding_model: where to load it from; default: the name that the collection was built with.
            token: default MILVUS_TOKEN.
            device: of the embedding model.
            **kwargs: as for the class.
        """
        store = MilvusStore.open(uri, collection_name, token=token)
        try:
            identity = store.identity()
            tokenizer = tokenizer if isinstance(tokenizer, BulkTokenizer) else BulkTokenizer(tokenizer)
            identity.check(store.where, tokenizer=tokenizer)  # before the embedding model is loaded, which takes longer
            embedder = Embedder(embedding_model or identity.embedding_model, device=device)
            return cls(store, tokenizer, embedder, **kwargs)
        except Exception:
            store.close()
            raise

    def retrieve(
        self,
        chunks: torch.LongTensor | Sequence[Sequence[int]],
        exclude_doc_ids: Sequence[Collection[str]] | None = None,
    ) -> Neighbors:
        """The k nearest chunks of the knowledge base to each chunk, by the cosine of their embeddings.

        Args:
            chunks: (n, chunk_size) token ids, or n lists of ids.
            exclude_doc_ids: for each chunk, documents that none of its neighbors may come from.

        Raises:
            KnowledgeBaseError: the search failed, and went on failing when tried again.
            ValueError: `exclude_doc_ids` has another length than `chunks`, or a plain string for a chunk.
        """
        rows = chunks.tolist() if isinstance(chunks, torch.Tensor) else [list(chunk) for chunk in chunks]
        for place, keys in enumerate(() if exclude_doc_ids is None else exclude_doc_ids):
            if isinstance(keys, str):  # a set of its letters would exclude nothing
                raise ValueError(f"exclude_doc_ids[{place}] is {keys!r}: give a collection of ids, such as {[keys]!r}.")
        excluded = [frozenset()] * len(rows) if exclude_doc_ids is None else [*map(frozenset, exclude_doc_ids)]
        if len(excluded) != len(rows):
            raise ValueError(f"There are {len(rows)} chunks and exclude_doc_ids for {len(excluded)}.")
        queries = [(tuple(row), keys) for row, keys in zip(rows, excluded, strict=True)]
        found = {query: self._cache[query] for query in queries if query in self._cache}
        missing = [query for query in dict.fromkeys(queries) if query not in found]
        if missing:
            try:
                found.update(zip(missing, self._search(missing), strict=True))
            except KnowledgeBaseError as error:
                if self.on_retrieval_error == "raise":
                    raise
                if not self.skipped_chunks:
                    logger.warning("Going on without neighbors, as on_retrieval_error='skip' says: %s", error)
                self.skipped_chunks += len(missing)
                return self._tensors([[] for _ in queries])
        for query in queries if self.cache_size else ():
            self._cache[query] = found[query]
            self._cache.move_to_end(query)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return self._tensors([found[query] for query in queries])

    def _search(self, queries: list[tuple[tuple[int, ...], frozenset[str]]]) -> list[list[dict[str, Any]]]:
        """At most k rows for each query, exactly the best of those allowed."""
        unique = {tokens: place for place, tokens in enumerate(dict.fromkeys(tokens for tokens, _ in queries))}
        vectors = self.embedder.encode([self.tokenizer.decode(list(tokens)) for tokens in unique])
        wanted = self.num_neighbors
        limit = wanted + (OVERFETCH if any(keys for _, keys in queries) else 0)
        hits = self.store.search(vectors, limit)
        results: list[list[dict[str, Any]]] = []
        again: dict[frozenset[str], list[int]] = {}
        for number, (tokens, keys) in enumerate(queries):
            rows = hits[unique[tokens]]
            results.append([row for row in rows if row["doc_id"] not in keys][:wanted])
            if len(results[-1]) < wanted and len(rows) == limit:  # there may be more behind those left out
                again.setdefault(keys, []).append(number)
        for keys, numbers in again.items():
            places = [unique[queries[number][0]] for number in numbers]
            refound = self.store.search(vectors[np.array(places)], wanted, exclude=map(doc_key, keys))
            for number, rows in zip(numbers, refound, strict=True):
                results[number] = rows
        return results

    def _tensors(self, found: list[list[dict[str, Any]]]) -> Neighbors:
        n, k, r = len(found), self.num_neighbors, self.neighbor_length
        ids, mask = np.zeros((n, k, r), dtype=np.int64), np.zeros((n, k, r), dtype=bool)
        indices, scores = np.full((n, k), -1), np.full((n, k), np.nan, dtype=np.float32)
        doc_ids: list[list[str | None]] = [[None] * k for _ in found]
        for chunk, rows in enumerate(found):
            for place, row in enumerate(rows):
                tokens = [*row["tokens"], *row["continuation"]][:r]
                ids[chunk, place, : len(tokens)] = tokens
                mask[chunk, place, : len(tokens)] = True
                doc_ids[chunk][place] = row["doc_id"]
                indices[chunk, place], scores[chunk, place] = row["chunk_index"], row["score"]
        return Neighbors(*map(torch.from_numpy, (ids, mask)), doc_ids, *map(torch.from_numpy, (indices, scores)))

    def describe(self) -> dict[str, str | int]:
        """What a model card says of the knowledge base: its names and size, never its address."""
        return {
            "embedding model": self.embedding_model,
            "collection": self.collection_name,
            "chunks": self.store.count(),
        }

    def close(self) -> None:
        """Release the knowledge base; a Milvus Lite file can then be opened by another process."""
        self.store.close()
