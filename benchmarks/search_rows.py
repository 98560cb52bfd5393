"""The ways to search that benchmarks/searches.py compares: what each needs, builds and finds."""

import functools
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import MINILM
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from splits import Split
from tokenizers import Tokenizer

from retrieval import BulkTokenizer, Document, Embedder, MilvusRetriever, MilvusStore, ingest

PARTS = ("training", "held_out")
REFERENCE = "dense, MiniLM"  # the row that others are compared with
COLLECTION = "text"


@dataclass(frozen=True)
class Row:
    """One way to search.

    Attributes:
        search: "dense", "bm25" or "hybrid".
        embedding: the embedding model's name in the table.
        model: its folder. With "bm25", these two name the hybrid knowledge base that is searched;
            the search itself uses no embeddings.
        reranker: folder of a cross-encoder; None for none.
        zero_scores: the copy head gets 0 for each neighbor's score.
    """

    search: str
    embedding: str
    model: str
    reranker: str | None = None
    zero_scores: bool = False

    @property
    def name(self) -> str:
        """The row's name in the table."""
        parts = [self.search] if self.search == "bm25" else [self.search, self.embedding]
        return ", ".join(parts + ["reranked"] * bool(self.reranker) + ["scores 0"] * self.zero_scores)

    @property
    def file_name(self) -> str:
        """The row's name in the names of files."""
        return self.name.replace(", ", "_").replace(" ", "_")

    def embedder(self) -> Embedder | None:
        """Return the embedding model, loaded once; None if the search uses none."""
        return None if self.search == "bm25" else load_embedder(self.model)

    def open(self, file: Path, tokenizer: BulkTokenizer, k: int, embedder: Embedder | None) -> MilvusRetriever:
        """Open a knowledge base for this search."""
        store = MilvusStore(str(file), COLLECTION)
        return MilvusRetriever(store, tokenizer, embedder, search=self.search, num_neighbors=k, reranker=self.reranker)


@functools.cache
def load_embedder(model: str) -> Embedder:
    """Load an embedding model, once in a process."""
    return Embedder(model, device="cpu")


def static_model(folder: Path) -> Path | None:
    """Return a folder with wordllama's static embeddings as a sentence-transformers model.

    They are pretrained vectors of Llama 2's tokens; a text's embedding is their mean.

    Returns:
        None if the package is not installed.
    """
    if not folder.exists():
        weights = inside("wordllama", "weights", "l2_supercat_256.safetensors")
        tokenizer = inside("wordllama", "tokenizers", "l2_supercat_tokenizer_config.json")
        if weights is None or tokenizer is None:
            return None
        vectors = load_file(weights)["embedding.weight"].float()
        embedding = StaticEmbedding(Tokenizer.from_file(str(tokenizer)), embedding_weights=vectors)
        SentenceTransformer(modules=[embedding], device="cpu").save_pretrained(str(folder))
    return folder


def inside(package: str, *path: str) -> Path | None:
    """Return a file of an installed package, without importing it; None if it is not installed."""
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent.joinpath(*path)


def all_rows(static: Path | None, mpnet: Path | None, reranker: Path | None) -> Iterator[Row]:
    """Yield the rows for which there are models, the reference first."""
    minilm = ("MiniLM", str(MINILM))
    for search in ("dense", "bm25", "hybrid"):
        yield Row(search, *minilm)
    if reranker is not None:
        yield Row("hybrid", *minilm, reranker=str(reranker))
    for name, folder in (("static", static), ("mpnet", mpnet)):
        if folder is not None:
            yield from (Row(search, name, str(folder)) for search in ("dense", "hybrid"))
    for search in ("dense", "bm25", "hybrid"):
        yield Row(search, *minilm, zero_scores=True)


def hybrid_base(folder: Path, row: Row, documents: list[Document], tokenizer: BulkTokenizer, size: int) -> Path:
    """Return the hybrid knowledge base that a row searches, built first if it is missing."""
    file, done = (folder / f"base_{row.embedding}{suffix}" for suffix in (".db", ".json"))
    if not done.exists():
        store = MilvusStore(str(file), COLLECTION)
        try:
            report = ingest(documents, store, tokenizer, load_embedder(row.model), search="hybrid", chunk_size=size)
            done.write_text(json.dumps({"rows": store.count(), "seconds": report.seconds}))
        finally:
            store.close()
    return file


def fetch(row: Row, file: Path, tokenizer: BulkTokenizer, split: Split, k: int) -> dict[str, np.ndarray]:
    """Return the neighbors of both parts' sequences, as arrays by part and name."""
    retriever, arrays = row.open(file, tokenizer, k, row.embedder()), {}
    size = retriever.chunk_size
    try:
        for part in PARTS:
            sequences: np.ndarray = getattr(split, part)
            per_sequence = (sequences.shape[1] - 1) // size  # nothing follows a chunk that ends a sequence
            chunks = sequences[:, : per_sequence * size].reshape(-1, size).tolist()
            exclude = None
            if part == "training":
                exclude = [{document} for document in split.training_documents for _ in range(per_sequence)]
            found = retriever.retrieve(chunks, exclude)
            for name, tensor in (("ids", found.ids), ("mask", found.attention_mask), ("scores", found.scores)):
                arrays[f"{part}_{name}"] = tensor.unflatten(0, (-1, per_sequence)).numpy()
    finally:
        retriever.close()
    return arrays
