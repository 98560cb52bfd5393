"""Measure ingestion in chunks/s, beside embedding alone and beside reading and writing alone.

    python benchmarks/ingestion.py                      # Python's sources, Milvus Lite
    python benchmarks/ingestion.py --uri http://127.0.0.1:19530 --no-words

An ingestion reads files, tokenizes, embeds, and writes to a new collection. "Embedding" gets the
chunks' texts as a list and does nothing else. "Reading and writing" reads, tokenizes and writes
rows with given vectors, one after the other. All take turns, each round in another order.

The static embeddings are MiniLM's own token embeddings: they cost what trained ones cost.
"""

import argparse
import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import MINILM, machine, read_files, source_files, source_tokenizer, spread

from retrieval import BulkTokenizer, Embedder, EmbedderSettings, MilvusStore, chunk_documents, ingest
from retrieval.ingestion import open_collection

CHUNK_SIZE = 64
WRITTEN = 512  # rows that "reading and writing" writes at a time
NEIGHBORS = 2  # of recall


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files, and the texts of their chunks in order."""

    files: list[Path]
    texts: list[str]

    @classmethod
    def of(cls, files: Sequence[Path], tokenizer: BulkTokenizer, wanted: int) -> "Corpus":
        """Return the first files, with `wanted` chunks or a few more."""
        corpus = cls([], [])
        for file in files:
            chunks = chunk_documents(read_files([file]), tokenizer, CHUNK_SIZE)
            corpus.files.append(file)
            corpus.texts.extend(tokenizer.decode_text(chunk.tokens) for chunk in chunks)
            if len(corpus.texts) >= wanted:
                break
        return corpus


class Sides:
    """The sides to measure. Each returns the seconds that it took."""

    def __init__(self, uri: str | None, tokenizer: BulkTokenizer) -> None:
        self.uri, self.tokenizer, self.made = uri, tokenizer, 0

    def embedding(self, corpus: Corpus, embedder: Embedder) -> float:
        """Embed the texts, and nothing else."""
        started = time.perf_counter()
        embedder.encode(corpus.texts)
        return time.perf_counter() - started

    def ingestion(self, corpus: Corpus, embedder: Embedder | None) -> float:
        """Ingest the files; without an embedding model, for search by words."""

        def fill(store: MilvusStore) -> None:
            search = None if embedder else "bm25"
            ingest(read_files(corpus.files), store, self.tokenizer, embedder, chunk_size=CHUNK_SIZE, search=search)

        return self._filled(corpus, fill)

    def reading_and_writing(self, corpus: Corpus, embedder: Embedder | None) -> float:
        """Read, tokenize and write rows, whose vectors, if they have any, are made before."""
        rng = np.random.default_rng(0)
        size = (len(corpus.texts), embedder.dimension if embedder else 0)
        vectors = rng.standard_normal(size, dtype=np.float32)

        def fill(store: MilvusStore) -> None:
            search = "dense" if embedder else "bm25"
            open_collection(store, self.tokenizer, embedder, CHUNK_SIZE, search=search)
            chunks = list(chunk_documents(read_files(corpus.files), self.tokenizer, CHUNK_SIZE))
            for start in range(0, len(chunks), WRITTEN):
                part = chunks[start : start + WRITTEN]
                texts = [self.tokenizer.decode_text(chunk.tokens) for chunk in part]
                store.upsert(part, vectors[start : start + WRITTEN] if embedder else None, texts)
            store.flush()

        return self._filled(corpus, fill)

    def _filled(self, corpus: Corpus, fill: Callable[[MilvusStore], None]) -> float:
        self.made += 1
        with tempfile.TemporaryDirectory() as folder:
            store = MilvusStore(self.uri or f"{folder}/kb.db", f"benchmark_{self.made}")
            started = time.perf_counter()
            fill(store)
            seconds = time.perf_counter() - started
            if store.count() != len(corpus.texts):
                raise RuntimeError(f"{store.count()} rows for {len(corpus.texts)} chunks.")
            store.connection.drop_collection(store.collection_name)
            store.close()
        return seconds


def static_embedder(folder: str) -> Embedder:
    """Make static embeddings of MiniLM's token embeddings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    minilm = SentenceTransformer(str(MINILM), device="cpu")
    bert: Any = minilm[0].auto_model
    weights = bert.get_input_embeddings().weight.detach().clone()
    parts: list[Any] = [StaticEmbedding(minilm.tokenizer, embedding_weights=weights)]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(folder)
    return Embedder(folder, device="cpu")


def recall(original: Embedder, other: Embedder, rows: Sequence[str], queries: Sequence[str]) -> float:
    """Return the share of exact search's neighbors that the other model finds, too.

    The other model embeds both the rows and the queries.
    """
    best = []
    for embedder in (original, other):
        scores = embedder.encode(queries, is_query=True) @ embedder.encode(rows).T
        best.append(np.argsort(-scores, axis=1)[:, :NEIGHBORS])
    return float(np.mean([len({*a} & {*b}) / NEIGHBORS for a, b in zip(*best, strict=True)]))


def main() -> None:
    """Run all sides in turns and print chunks/s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=20_000, help="for static embeddings and search by words")
    parser.add_argument("--transformer-chunks", type=int, default=1500, help="for MiniLM")
    parser.add_argument("--recall-chunks", type=int, default=4000, help="0 leaves recall out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--uri", help="of a server; default: a Milvus Lite file in a temporary folder")
    parser.add_argument("--no-words", action="store_true", help="for servers before 2.5, which have no BM25")
    arguments = parser.parse_args()

    files = source_files()
    tokenizer = BulkTokenizer(source_tokenizer(files))
    minilm = Embedder(str(MINILM), device="cpu")
    openvino = Embedder(str(MINILM), settings=EmbedderSettings(backend="openvino"))
    with tempfile.TemporaryDirectory() as folder:
        static = static_embedder(folder)
    many = Corpus.of(files, tokenizer, arguments.chunks)
    few = Corpus.of(files[::29], tokenizer, arguments.transformer_chunks)
    print(f"{machine()}, {torch.get_num_threads()} torch threads; {len(many.texts):,} and {len(few.texts):,} chunks")

    sides = Sides(arguments.uri, tokenizer)
    runs: list[tuple[str, Corpus, Callable[[Corpus, Any], float], Embedder | None]] = []
    for name, corpus, embedder in (("MiniLM", few, minilm), ("OpenVINO", few, openvino), ("static", many, static)):
        embedder.encode(few.texts[:64])  # warm
        runs += [(f"{name}: embedding", corpus, sides.embedding, embedder)]
        runs += [(f"{name}: ingestion", corpus, sides.ingestion, embedder)]
    runs += [("vectors: reading and writing", many, sides.reading_and_writing, static)]
    if not arguments.no_words:
        runs += [("words: ingestion", many, sides.ingestion, None)]
        runs += [("words: reading and writing", many, sides.reading_and_writing, None)]
    speeds: dict[str, list[float]] = {name: [] for name, *_ in runs}
    for number in range(arguments.rounds):
        for name, corpus, run, model in runs[number % len(runs) :] + runs[: number % len(runs)]:
            speeds[name].append(len(corpus.texts) / run(corpus, model))
    for name, values in speeds.items():
        print(f"{name:30s} {spread(values)} chunks/s")
    print(f"most memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if arguments.recall_chunks:
        rows = Corpus.of(files[::97], tokenizer, arguments.recall_chunks).texts
        queries = Corpus.of(files[5::997], tokenizer, arguments.recall_chunks // 10).texts
        share = recall(minilm, openvino, rows, queries)
        print(f"recall@{NEIGHBORS} of OpenVINO: {share:.4f} of {len(queries):,} queries, {len(rows):,} chunks")


if __name__ == "__main__":
    main()
