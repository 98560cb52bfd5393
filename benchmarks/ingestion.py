"""Measure ingestion in chunks/s, beside `SentenceTransformer.encode` alone on the same chunks.

    python benchmarks/ingestion.py                      # Python's sources, MiniLM, Milvus Lite
    python benchmarks/ingestion.py --uri http://127.0.0.1:19530

An ingestion reads files, tokenizes, looks up existing rows, embeds, and writes to a new collection;
`encode` gets the chunks' texts as a list and does nothing else. The two take turns, and each goes
first every other time.
"""

import argparse
import functools
import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from machine import MINILM, machine, read_files, source_files, source_tokenizer, spread

from retrieval import BulkTokenizer, Embedder, MilvusStore, chunk_documents, ingest

CHUNK_SIZE = 64


def choose(files: Sequence[Path], tokenizer: BulkTokenizer, wanted: int) -> tuple[list[Path], list[str]]:
    """Files with `wanted` chunks or a few more, and the chunks' texts in order."""
    texts: list[str] = []
    chosen: list[Path] = []
    for file in files:
        chosen.append(file)
        texts += [tokenizer.decode(c.tokens) for c in chunk_documents(read_files([file]), tokenizer, CHUNK_SIZE)]
        if len(texts) >= wanted:
            break
    return chosen, texts


def main() -> None:
    """Run both sides in turns and print chunks/s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--uri", help="of a server; default: a Milvus Lite file in a temporary folder")
    parser.add_argument("--embedding-model", default=str(MINILM))
    arguments = parser.parse_args()

    files = source_files()
    tokenizer = BulkTokenizer(source_tokenizer(files))
    embedder = Embedder(arguments.embedding_model)
    chosen, texts = choose(files, tokenizer, arguments.chunks)
    embedder.encode(texts[:256])  # warm
    print(f"{machine()}, {torch.get_num_threads()} torch threads\n{len(texts):,} chunks of {len(chosen):,} files")

    def encode() -> None:
        embedder.model.encode(texts, batch_size=embedder.batch_size, normalize_embeddings=True, show_progress_bar=False)

    def whole(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = MilvusStore(arguments.uri or f"{folder}/kb.db", name)
            report = ingest(read_files(chosen), store, tokenizer, embedder, chunk_size=CHUNK_SIZE)
            if not report.chunks_written == len(texts) == store.count():
                raise RuntimeError(f"{report} and {store.count()} rows for {len(texts)} chunks.")
            store.connection.drop_collection(name)
            store.close()

    speeds: dict[str, list[float]] = {"encode alone": [], "ingestion": []}
    for number in range(arguments.rounds):
        sides: list[tuple[str, Callable[[], object]]] = [
            ("encode alone", encode),
            ("ingestion", functools.partial(whole, f"benchmark_{number}")),
        ]
        for name, run in itertools.islice(itertools.cycle(sides), number % 2, number % 2 + 2):
            started = time.perf_counter()
            run()
            speeds[name].append(len(texts) / (time.perf_counter() - started))
            print(f"round {number + 1}, {name}: {speeds[name][-1]:.1f} chunks/s", flush=True)
    ratios = [100 * b / a for a, b in zip(*speeds.values(), strict=True)]
    for name, values in speeds.items():
        print(f"{name:13s} {spread(values)} chunks/s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"ingestion / encode alone, round by round: {spread(ratios, ' %')}; most memory of the process {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
