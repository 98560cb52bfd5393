"""MilvusRetriever: finds the neighbors of token chunks in a knowledge base."""

import copy
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .addresses import MilvusAddress
from .connection import Row
from .embedding import Embedder, EmbedderSettings
from .errors import IdentityMismatch, KnowledgeBaseError
from .filters import Filter, filter_expression
from .neighbors import Neighbors
from .reranking import RERANK_CANDIDATES, PairScorer, Reranker
from .rows import doc_key
from .searches import Queries, load_embedder, search_of, wanted_search
from .store import MOST_HITS, MilvusStore
from .tokenization import BulkTokenizer

logger = logging.getLogger(__name__)

# Rows asked for beyond k where some may be left out: a chunk's nearest rows are often its own
# document's.
OVERFETCH = 8
COLLECTION_NAME = "retro"  # unless another one is named
NUM_NEIGHBORS = 2  # the paper's k, unless another number is given

# A chunk's tokens, its continuation (for the leakage filter), and the documents that it may not
# read
Query = tuple[tuple[int, ...], tuple[int, ...], frozenset[str]]
Rows = list[Row]


class MilvusRetriever:
    """Find neighbors in a collection; give it to a model with `retriever=` or `set_retriever`.

    A copy shares the connection and the embedding model; closing one closes all. A pickled or
    forked retriever opens the knowledge base again on first use, and takes a token from
    MILVUS_TOKEN. Each counts its own `skipped_chunks` and remembers its own neighbors.

    Args:
        store: an open collection that has rows.
        tokenizer: the tokenizer that it was built with.
        embedder: the embedding model that it was built with; None for search by words alone.
        search: "dense" (by meaning), "bm25" (by words) or "hybrid" (by both). Default: the one that
            the collection was built for. A hybrid collection can be searched in all three ways.
        num_neighbors: neighbors of a chunk, the paper's k.
        neighbor_length: tokens of a neighbor, the paper's r. Default: 2 * chunk_size, the chunk and
            its continuation.
        filter: read only documents whose metadata match, such as {"license": ["mit", "bsd"],
            "year": {">=": 2000}}; see [`retrieval.filters`].
        max_leakage: leave out neighbors that share a run of tokens with the chunk and its
            continuation, if the run is longer than this share of a chunk (the paper's evaluation
            filter, section 2.6). None leaves out none. The continuation is known in training only.
        cache_size: chunks whose neighbors are remembered, for training over several epochs; 0
            remembers none. All are forgotten when the collection changes.
        on_retrieval_error: "raise", or "skip" to continue without neighbors, counted in
            `skipped_chunks`.
        reranker: a cross-encoder that chooses the neighbors from more candidates, by name or
            folder, or a [`Reranker`]. It sets their order; scores stay the search's.
        rerank_candidates: rows that the reranker reads for each chunk.

    Raises:
        KnowledgeBaseError: the collection is empty, was made with another tokenizer or embedding
            model, or was not built for this search; or the reranker cannot be loaded.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        store: MilvusStore,
        tokenizer: PreTrainedTokenizerBase | BulkTokenizer,
        embedder: Embedder | None = None,
        *,
        search: str | None = None,
        num_neighbors: int = NUM_NEIGHBORS,
        neighbor_length: int | None = None,
        filter: Filter | None = None,
        max_leakage: float | None = None,
        cache_size: int = 0,
        on_retrieval_error: str = "raise",
        reranker: str | os.PathLike[str] | PairScorer | Reranker | None = None,
        rerank_candidates: int = RERANK_CANDIDATES,
    ) -> None:
        self.store = store
        self.tokenizer = tokenizer if isinstance(tokenizer, BulkTokenizer) else BulkTokenizer(tokenizer)
        identity = store.identity()
        self.search = wanted_search(store, identity, search)
        self.embedder = embedder and embedder.for_collection(identity.embedding_settings)
        self._searcher = search_of(store, identity, self.search, self.embedder)
        identity.check(store.where, tokenizer=self.tokenizer, embedder=self.embedder)
        self.chunk_size = identity.chunk_size
        self.vocab_size = identity.vocab_size
        self.embedding_model = None if embedder is None else identity.embedding_model
        self.tokenizer_fingerprint = identity.tokenizer_fingerprint
        self.collection_name = store.collection_name
        self.num_neighbors = num_neighbors
        self.neighbor_length = 2 * self.chunk_size if neighbor_length is None else neighbor_length
        _check_num_neighbors(num_neighbors)
        if reranker is not None and not num_neighbors <= rerank_candidates <= MOST_HITS - OVERFETCH:
            raise ValueError(
                f"rerank_candidates is {rerank_candidates}; it must be from num_neighbors ({num_neighbors}) to "
                f"{MOST_HITS - OVERFETCH}."
            )
        if cache_size < 0:
            raise ValueError(f"cache_size is {cache_size}; it must be 0 (remember nothing) or more.")
        if not 1 <= self.neighbor_length <= 2 * self.chunk_size:
            raise ValueError(
                f"neighbor_length is {neighbor_length}; the knowledge base has a chunk and its continuation, "
                f"{2 * self.chunk_size} tokens."
            )
        if max_leakage is not None and not 0 <= max_leakage <= 2:
            raise ValueError(
                f"max_leakage is a share of a chunk, between 0 and 2 (with what follows it), not {max_leakage}."
            )
        if on_retrieval_error not in ("raise", "skip"):
            raise ValueError(f"on_retrieval_error must be 'raise' or 'skip', not {on_retrieval_error!r}.")
        if store.count() == 0:
            raise KnowledgeBaseError(f"{store.where} is empty: ingest documents first (`python -m retrieval ingest`).")
        self.expression = filter_expression(filter or {})
        self.max_leakage = max_leakage
        self.on_retrieval_error = on_retrieval_error
        self.cache_size = cache_size
        self.reranker = reranker if isinstance(reranker, Reranker) or reranker is None else Reranker(reranker)
        self._rows_wanted = num_neighbors if reranker is None else rerank_candidates
        self._begin()
        self._checked = True

    def _begin(self) -> None:
        """Start with empty counts and an empty memory."""
        self.skipped_chunks = 0
        self._cache: OrderedDict[Query, Rows] = OrderedDict()
        self._cached_revision = ""
        self._lock = threading.Lock()  # training reads ahead in a thread of its own
        self._process = os.getpid()
        self._checked = False  # the knowledge base was not yet compared with the settings

    def __getstate__(self) -> dict[str, Any]:
        own = ("skipped_chunks", "_cache", "_cached_revision", "_lock", "_process", "_checked")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    def __deepcopy__(self, memo: dict) -> "MilvusRetriever":
        return copy.copy(self)

    @classmethod
    def from_uri(
        cls,
        uri: str | os.PathLike[str] | MilvusAddress | None = None,
        collection_name: str = COLLECTION_NAME,
        *,
        tokenizer: PreTrainedTokenizerBase | BulkTokenizer,
        embedding_model: str | None = None,
        device: str | torch.device | None = None,
        search: str | None = None,
        search_params: Mapping[str, int] | None = None,
        num_neighbors: int = NUM_NEIGHBORS,
        neighbor_length: int | None = None,
        filter: Filter | None = None,
        max_leakage: float | None = None,
        cache_size: int = 0,
        on_retrieval_error: str = "raise",
        embedding_settings: EmbedderSettings | None = None,
        reranker: str | os.PathLike[str] | PairScorer | Reranker | None = None,
        rerank_candidates: int = RERANK_CANDIDATES,
    ) -> "MilvusRetriever":
        """Open a knowledge base.

        Args:
            uri: a Milvus Lite file (.db) or the URI of a server; [`MilvusAddress`] adds token,
                database, TLS and timeout. Default: the environment variable MILVUS_URI.
            collection_name: the collection.
            tokenizer: the model's.
            embedding_model: name or folder to load it from. Default: the name that the collection
                was built with. Search by words loads none.
            device: the embedding model's and the reranker's, such as "cpu" or "cuda:1". Default:
                the best there is.
            search_params: the vector index's search parameters, such as {"ef": 128}.
            search, num_neighbors, neighbor_length, filter, max_leakage, cache_size,
                on_retrieval_error, reranker, rerank_candidates: as for the class.
            embedding_settings: prompts, truncation, backend and trust in remote code. What is not
                given is as the collection was built.

        Raises:
            KnowledgeBaseError, ValueError: as the class, [`MilvusAddress`] and
                [`MilvusStore.open`]; also if an embedding model is named for search by words.
        """
        store = MilvusStore.open(uri, collection_name, search_params=search_params)
        try:
            identity = store.identity()
            tokenizer = tokenizer if isinstance(tokenizer, BulkTokenizer) else BulkTokenizer(tokenizer)
            identity.check(store.where, tokenizer=tokenizer)  # before the embedding model is loaded
            search, settings = wanted_search(store, identity, search), embedding_settings or EmbedderSettings()
            if isinstance(reranker, str | os.PathLike):
                reranker = Reranker(reranker, device=device, trust_remote_code=settings.trust_remote_code)
            return cls(
                store,
                tokenizer,
                load_embedder(identity, search, embedding_model, settings, device=device),
                search=search,
                num_neighbors=num_neighbors,
                neighbor_length=neighbor_length,
                filter=filter,
                max_leakage=max_leakage,
                cache_size=cache_size,
                on_retrieval_error=on_retrieval_error,
                reranker=reranker,
                rerank_candidates=rerank_candidates,
            )
        except Exception:
            store.close()
            raise

    def with_neighbors(self, num_neighbors: int) -> "MilvusRetriever":
        """Return a retriever of the same knowledge base that finds another number of neighbors.

        Both share the connection, so that closing one closes both.

        Raises:
            ValueError: the number is out of its range.
        """
        _check_num_neighbors(num_neighbors)
        other = copy.copy(self)
        other.num_neighbors = num_neighbors
        other._rows_wanted = num_neighbors if self.reranker is None else max(self._rows_wanted, num_neighbors)
        return other

    def retrieve(
        self,
        chunks: torch.Tensor | Sequence[Sequence[int]],
        exclude_doc_ids: Sequence[Collection[str]] | None = None,
        continuations: Sequence[Sequence[int]] | None = None,
    ) -> Neighbors:
        """Return the k chunks of the knowledge base that the search finds best for each chunk.

        Special tokens are not searched for. A chunk without other tokens has no neighbors.

        Args:
            chunks: (n, m) int64 token ids, or n lists of ids, each of 1 to chunk_size.
            exclude_doc_ids: for each chunk, documents that its neighbors must not come from.
            continuations: for each chunk, the up to chunk_size ids that follow it, for
                `max_leakage`.

        Raises:
            KnowledgeBaseError: the search failed, also when it was retried.
            ValueError: a chunk is empty or longer than chunk_size, an argument has another length
                than `chunks`, or a string is given instead of a collection of document ids.
        """
        queries = self._queries(chunks, exclude_doc_ids, continuations)
        if self._process != os.getpid():  # forked; a thread of the parent may have held the lock
            self._begin()
        with self._lock:
            return self._retrieve(queries)

    def _retrieve(self, queries: list[Query]) -> Neighbors:
        found: dict[Query, Rows] = {}
        try:
            if not self._checked:
                identity = self.store.identity()
                identity.check(
                    self.store.where, tokenizer=self.tokenizer, embedder=self.embedder, chunk_size=self.chunk_size
                )
                self._checked = True
            if self.cache_size:
                self._forget_if_changed()
                found = {query: self._cache[query] for query in queries if query in self._cache}
            missing = [query for query in dict.fromkeys(queries) if query not in found]
            if missing:
                found.update(zip(missing, self._search(missing), strict=True))
        except KnowledgeBaseError as error:
            if self.on_retrieval_error == "raise" or isinstance(error, IdentityMismatch):
                raise
            found = {query: self._cache[query] for query in queries if query in self._cache}
            if not self.skipped_chunks:
                logger.warning("Going on without neighbors, as on_retrieval_error='skip' says: %s", error)
            self.skipped_chunks += len(set(queries) - found.keys())
            return self._tensors([found.get(query, []) for query in queries])
        for query in queries if self.cache_size else ():
            self._cache[query] = found[query]
            self._cache.move_to_end(query)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return self._tensors([found[query] for query in queries])

    def _queries(
        self,
        chunks: torch.Tensor | Sequence[Sequence[int]],
        exclude_doc_ids: Sequence[Collection[str]] | None,
        continuations: Sequence[Sequence[int]] | None,
    ) -> list[Query]:
        rows = chunks.tolist() if isinstance(chunks, torch.Tensor) else [list(chunk) for chunk in chunks]
        for place, row in enumerate(rows):
            if not 1 <= len(row) <= self.chunk_size:
                raise ValueError(
                    f"chunks[{place}] has {len(row)} tokens. Search for 1 to {self.chunk_size}, the chunk size of "
                    f"{self.store.where}."
                )
        for place, keys in enumerate(() if exclude_doc_ids is None else exclude_doc_ids):
            if isinstance(keys, str):  # a set of its letters would exclude nothing
                raise ValueError(f"exclude_doc_ids[{place}] is {keys!r}: give a collection of ids, such as {[keys]!r}.")
        excluded = [frozenset()] * len(rows) if exclude_doc_ids is None else [*map(frozenset, exclude_doc_ids)]
        following = (
            [()] * len(rows) if continuations is None or self.max_leakage is None else [*map(tuple, continuations)]
        )
        for name, given in (("exclude_doc_ids", excluded), ("continuations", following)):
            if len(given) != len(rows):
                raise ValueError(f"There are {len(rows)} chunks and {name} for {len(given)}.")
        return [(tuple(row), after, keys) for row, after, keys in zip(rows, following, excluded, strict=True)]

    def _forget_if_changed(self) -> None:
        revision = self.store.revision()
        if revision != self._cached_revision:
            self._cache.clear()
            self.store.catch_up()  # or what is remembered next could be what was there before
            self._cached_revision = revision

    def _search(self, queries: list[Query]) -> list[Rows]:
        """Return the best rows that each query may read, at most k, exactly.

        With a reranker, these are its choice from the best `rerank_candidates` rows.
        """
        texts = {tokens: self.tokenizer.decode_text(tokens) for tokens, _, _ in queries}
        unique = {tokens: place for place, tokens in enumerate(tokens for tokens, text in texts.items() if text)}
        results: list[Rows] = [[] for _ in queries]
        if not unique:
            return results
        wanted = self._searcher.queries([texts[tokens] for tokens in unique])
        room = OVERFETCH if self.max_leakage is not None or any(keys for _, _, keys in queries) else 0
        limit = self._rows_wanted + room
        hits = self._searcher.best(wanted, limit, expression=self.expression)
        short: dict[frozenset[str], list[int]] = {}
        for number, query in enumerate(queries):
            tokens, _, keys = query
            if tokens not in unique:
                continue
            rows = hits[unique[tokens]]
            results[number] = self._allowed(query, rows)
            if len(results[number]) < self._rows_wanted and not (self._searcher.is_exact and len(rows) < limit):
                short.setdefault(keys, []).append(number)  # there may be more behind those left out
        for keys, numbers in short.items():
            places = [unique[queries[number][0]] for number in numbers]
            refound = self._search_without(wanted.take(places), [queries[number] for number in numbers], keys)
            for number, rows in zip(numbers, refound, strict=True):
                results[number] = rows
        if self.reranker is not None:
            row_texts = [[self.tokenizer.decode_text(row["tokens"]) for row in rows] for rows in results]
            query_texts = [texts[tokens] for tokens, _, _ in queries]
            results = self.reranker.best(query_texts, results, row_texts, self.num_neighbors)
        return results

    def _search_without(self, wanted: Queries, queries: list[Query], keys: frozenset[str]) -> list[Rows]:
        """Search again with the documents of `keys` excluded by Milvus, ever deeper.

        The search ends when k rows are found that the query may read, or when all rows were seen.
        """
        exclude = [doc_key(key) for key in keys]
        results: list[Rows] = [[] for _ in queries]
        left, limit = list(range(len(queries))), self._rows_wanted + OVERFETCH
        while left:
            hits = self._searcher.all_best(wanted.take(left), limit, exclude=exclude, expression=self.expression)
            for number, rows in zip(left, hits, strict=True):
                results[number] = self._allowed(queries[number], rows)
            if limit == MOST_HITS:
                break
            left = [
                number
                for number, rows in zip(left, hits, strict=True)
                if len(rows) == limit and len(results[number]) < self._rows_wanted
            ]
            limit = min(8 * limit, MOST_HITS)
        return results

    def _allowed(self, query: Query, rows: Rows) -> Rows:
        """Return the first of these rows, in their order, that this chunk may read."""
        tokens, following, keys = query
        rows = [row for row in rows if row["doc_id"] not in keys]
        if self.max_leakage is not None:
            run = int(self.max_leakage * self.chunk_size) + 1  # the shortest run that is too long
            text = runs((*tokens, *following), run)
            rows = [row for row in rows if text.isdisjoint(runs((*row["tokens"], *row["continuation"]), run))]
        return rows[: self._rows_wanted]

    def _tensors(self, found: list[Rows]) -> Neighbors:
        return Neighbors.of(found, self.num_neighbors, self.neighbor_length)

    def describe(self) -> dict[str, str | int | list[str]]:
        """Return names and size of the knowledge base for a model card, never its address."""
        return {
            "search": self.search,
            **({} if self.embedding_model is None else {"embedding model": self.embedding_model}),
            "collection": self.collection_name,
            "chunks": self.store.count(),
            "sources": self.store.sources(),
        }

    def close(self) -> None:
        """Release the knowledge base; a Milvus Lite file can then be opened by another process."""
        self.store.close()


def runs(tokens: Sequence[int], length: int) -> set[tuple[int, ...]]:
    """Return all runs of `length` tokens.

    Two texts share a run of at least that length if their sets of runs have a common member.
    """
    return {tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)}


def _check_num_neighbors(num_neighbors: int) -> None:
    """Raise ValueError if a search cannot find so many neighbors."""
    if not 1 <= num_neighbors <= MOST_HITS - OVERFETCH:
        raise ValueError(f"num_neighbors must be from 1 to {MOST_HITS - OVERFETCH}, not {num_neighbors}.")
