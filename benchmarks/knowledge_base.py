"""Measure search by index on Milvus Lite and a server: recall, queries/s, latency.

    python benchmarks/knowledge_base.py                                # Milvus Lite
    python benchmarks/knowledge_base.py --uri http://127.0.0.1:19530   # both, in turns
    python benchmarks/knowledge_base.py --vectors 1000000 --synthetic  # larger sizes

Vectors are MiniLM's, of 64-token chunks of the sources and documentation of Python and its
installed packages; --cache keeps them for the next run. Queries are chunks that the collection does
not hold. --synthetic mixes two real vectors and noise. The benchmark prints median, least and most.
"""

import argparse
import itertools
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import MINILM, machine, read_files, source_files, source_tokenizer, spread

from retrieval import (
    BulkTokenizer,
    Chunk,
    Embedder,
    IndexSettings,
    MilvusAddress,
    MilvusStore,
    NewCollection,
    chunk_documents,
)
from retrieval.identity import Identity

QUERIES = 1024
LITE = ["FLAT", "HNSW", "IVF_FLAT", "IVF_SQ8"]
SERVER = ["FLAT", "HNSW", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "DISKANN"]


def real_vectors(count: int, tokenizer: BulkTokenizer, embedder: Embedder, cache: Path) -> np.ndarray:
    """At least `count` of them, if there is so much text; those made earlier are read."""
    cache.mkdir(parents=True, exist_ok=True)
    parts = [np.load(file) for file in sorted(cache.glob("part*.npy"))]
    there = sum(map(len, parts))
    chunks = itertools.islice(chunk_documents(read_files(source_files()), tokenizer, 64), there, None)
    while there < count and (some := list(itertools.islice(chunks, 8192))):
        parts.append(embedder.encode([tokenizer.decode(chunk.tokens) for chunk in some]))
        np.save(cache / f"part{len(parts) - 1:03d}.npy", parts[-1])
        there += len(some)
        print(f"{there:,} chunks embedded", flush=True)
    return np.concatenate(parts)


def enlarge(vectors: np.ndarray, count: int) -> np.ndarray:
    """`count` vectors like these."""
    random = np.random.default_rng(0)
    out = np.empty((count, vectors.shape[1]), dtype=np.float32)
    for start in range(0, count, 10_000):
        a, b = (vectors[random.integers(len(vectors), size=min(10_000, count - start))] for _ in range(2))
        mixed = a + 0.5 * b + 0.02 * random.standard_normal(a.shape, dtype=np.float32)
        out[start : start + len(a)] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    return out


def least_scores(vectors: np.ndarray, queries: np.ndarray, k: int) -> list[float]:
    """Return the exact score of each query's k-th nearest vector.

    Equal chunks have equal scores, so any of them counts as found.
    """
    return [float(np.partition(vectors @ query, -k)[-k]) for query in queries]


def measure(store: MilvusStore, vectors: np.ndarray, queries: np.ndarray, truth: list[float], k: int) -> dict[str, str]:
    """Return recall against exact search, queries/s by batch size, and latency."""
    hits = [row for start in range(0, len(queries), 256) for row in store.search(queries[start : start + 256], k)]
    # by the true scores: those that a quantized index returns are approximate
    scores = [vectors[[row["chunk_index"] for row in rows]] @ query for rows, query in zip(hits, queries, strict=True)]
    right = [(found >= least - 1e-5).sum() / k for found, least in zip(scores, truth, strict=True)]
    result = {"recall": f"{np.mean(right):.4f}"}
    for batch in (1, 16, 256):
        times = []
        for start in itertools.islice(
            itertools.cycle(range(0, len(queries) - batch + 1, batch)), 200 if batch == 1 else 12
        ):
            began = time.perf_counter()
            store.search(queries[start : start + batch], k)
            times.append(time.perf_counter() - began)
        result[f"queries/s at {batch}"] = spread([batch / seconds for seconds in times], digits=0)
        if batch == 1:
            p50, p99 = 1000 * statistics.median(times), 1000 * statistics.quantiles(times, n=100)[98]
            result["p50, p99 ms"] = f"{p50:.1f}, {p99:.1f}"
    return result


def disk(folder: Path) -> float:
    """Return the size of a folder in MB."""
    done = subprocess.run(["du", "-sm", folder], capture_output=True, text=True)
    return float(done.stdout.split()[0])


def main() -> None:
    """Write the vectors, build each index, and print its measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", help="URI of a server to measure as well")
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--indexes", nargs="+", help="indexes to measure (default: all that the side can build)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "retro-benchmark-vectors")
    arguments = parser.parse_args()
    k = 2
    tokenizer, embedder = BulkTokenizer(source_tokenizer(source_files())), Embedder(str(MINILM))
    wanted = QUERIES + (100_000 if arguments.synthetic else arguments.vectors)
    vectors = real_vectors(wanted, tokenizer, embedder, arguments.cache)[:wanted]
    queries, vectors = (
        vectors[:: len(vectors) // QUERIES][:QUERIES],
        np.delete(vectors, np.s_[:: len(vectors) // QUERIES], 0),
    )
    if arguments.synthetic:
        vectors = enlarge(vectors, arguments.vectors)
    truth = least_scores(vectors, queries, k)
    print(f"{machine()}\n{len(vectors):,} vectors of {vectors.shape[1]}, k = {k}", flush=True)
    folder = Path(tempfile.mkdtemp())
    sides = {"Milvus Lite": (str(folder / "kb.db"), LITE)}
    if arguments.uri:
        sides["server"] = (arguments.uri, SERVER)
    tokens = np.random.default_rng(1).integers(0, 8192, (len(vectors), 128))
    try:
        for side, (uri, kinds) in sides.items():
            store = MilvusStore(MilvusAddress(uri, timeout=3600), "benchmark")
            if store.exists():
                store.connection.drop_collection("benchmark")
            store.create(Identity.of(tokenizer, embedder, 64), NewCollection(IndexSettings.parse("FLAT")))
            began = time.perf_counter()
            for start in range(0, len(vectors), 5000):
                rows = range(start, min(start + 5000, len(vectors)))
                chunks = [
                    Chunk(f"document {i // 20}", i, tokens[i, :64].tolist(), tokens[i, 64:].tolist()) for i in rows
                ]
                store.upsert(chunks, vectors[start : start + 5000])
            store.flush()
            seconds = time.perf_counter() - began
            store.connection.load_collection("benchmark")
            print(f"{side}: {len(vectors) / seconds:,.0f} rows/s written", flush=True)
            for kind in arguments.indexes or kinds:
                began = time.perf_counter()
                store.reindex(IndexSettings.parse(kind))
                while store.connection.describe_index("benchmark", "embedding").get("pending_index_rows"):
                    time.sleep(1)
                result = {"index": kind, "built in s": f"{time.perf_counter() - began:.0f}"}
                result |= measure(store, vectors, queries, truth, k)
                if side == "Milvus Lite":
                    result["disk MB"] = f"{disk(folder):.0f}"
                print(f"{side}: " + "; ".join(f"{name} {value}" for name, value in result.items()), flush=True)
            store.connection.drop_collection("benchmark")
            store.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
