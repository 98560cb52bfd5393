"""Sharing a knowledge base: export to Parquet files, upload to the hub, import."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from tqdm.auto import tqdm

from .chunking import Chunk, check_id, source_names
from .collection import NewCollection
from .errors import IdentityMismatch, KnowledgeBaseError
from .identity import Identity
from .quiet import no_dataset_bars
from .rows import VECTORS
from .store import ROWS_PER_CALL, MilvusStore
from .tokenization import BulkTokenizer

ROWS_PER_FILE = 200_000
README = """---
tags: [retro, knowledge-base]
---
# {name}

A knowledge base for RETRO models: {chunks:,} chunks of {chunk_size} tokens, tokenizer `{tokenizer}`, {searched}.

```sh
python -m retrieval import {name} --uri kb.db
```
"""


def export_knowledge_base(
    store: MilvusStore, folder: str | os.PathLike, tokenizer: BulkTokenizer, *, progress: bool = False
) -> int:
    """Write all rows as Parquet files with a README.

    [`import_knowledge_base`] and `datasets.load_dataset` read the folder, which appears when it is
    complete.

    Args:
        folder: a new folder.
        tokenizer: the knowledge base's, to decode the texts.
        progress: show a progress bar, in chunks.

    Returns:
        the number of chunks.

    Raises:
        KnowledgeBaseError: the folder exists already, or the collection is empty.
        IdentityMismatch: the collection was made with another tokenizer.
    """
    folder = Path(folder)
    if folder.exists():
        raise KnowledgeBaseError(f"{folder} exists already. Export into a new folder.")
    identity = store.identity()
    identity.check(store.where, tokenizer=tokenizer)
    chunks = store.count()
    if not chunks:
        raise KnowledgeBaseError(f"{store.where} is empty: there is nothing to export.")
    features = Features(
        {name: Value("string") for name in ("doc_id", "text", "metadata")}
        | {"chunk_index": Value("int64")}
        | {name: List(Value("int32")) for name in ("tokens", "continuation")}
    )
    if identity.embedding_dimension is not None:
        features[VECTORS] = List(Value("float32"), length=identity.embedding_dimension)

    def rows() -> Iterator[dict[str, Any]]:
        vectors = [VECTORS] if identity.has_vectors else []
        fields = ("doc_id", "chunk_index", "tokens", "continuation", "metadata", *vectors)
        for row in tqdm(store.scan(fields), total=chunks, unit=" chunks", desc="export", disable=not progress):
            embedding = {VECTORS: store.vector(row[VECTORS])} if vectors else {}
            yield {
                "doc_id": row["doc_id"],
                "chunk_index": row["chunk_index"],
                "tokens": list(row["tokens"]),
                "continuation": list(row["continuation"]),
                "text": tokenizer.decode(row["tokens"], starts_text=row["chunk_index"] == 0),
                "metadata": json.dumps(row["metadata"]),
                **embedding,
            }

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # a fresh fingerprint: `datasets` would otherwise pickle the generator to make one
        cache = draft / ".cache"
        with no_dataset_bars():
            dataset = Dataset.from_generator(rows, features=features, cache_dir=str(cache), fingerprint=draft.name)
            files = -(-len(dataset) // ROWS_PER_FILE)
            (draft / "data").mkdir()
            for number in range(files):
                file = draft / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
                dataset.shard(files, number, contiguous=True).to_parquet(file)
        written = len(dataset)
        del dataset
        shutil.rmtree(cache)
        (draft / "identity.json").write_text(identity.to_json())
        facts = asdict(identity) | {"name": folder.name, "chunks": written, "searched": _searched_by(identity)}
        (draft / "README.md").write_text(README.format(**facts))
        draft.chmod(0o755)
        draft.replace(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return written


def _searched_by(identity: Identity) -> str:
    """Return what the rows are searched by, for the README."""
    vectors = f"embeddings of\n`{identity.embedding_model}` ({identity.embedding_dimension} numbers)"
    words = f"searched by words (BM25, analyzer `{json.dumps(identity.analyzer)}`)"
    return {"dense": vectors, "bm25": words, "hybrid": f"{vectors}, also {words}"}[identity.search]


def push_knowledge_base(folder: str | os.PathLike, repo_id: str, *, private: bool = True) -> str:
    """Upload an exported folder to the hub as a dataset repository; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=str(folder))
    return str(url)


def import_knowledge_base(
    source: str, store: MilvusStore, *, new: NewCollection | None = None, progress: bool = False
) -> int:
    """Write exported rows into a collection, which is made if it is missing.

    Nothing is embedded again. Rows keep their keys, so running it again completes an interrupted
    import.

    Args:
        source: an exported folder, or the name of a dataset on the hub.
        new: how the collection is made, if it is not there.
        progress: show a progress bar, in chunks.

    Returns:
        the number of chunks.

    Raises:
        KnowledgeBaseError: there is no exported knowledge base, or a row of it is damaged.
        IdentityMismatch: the collection exists and was made with other models.
    """
    stored, rows = _open_export(source)
    identity = Identity.from_json(stored, source)
    if not store.exists():
        store.create(identity, new)
    if differences := store.identity().differences(identity):
        raise IdentityMismatch(
            f"{store.where} and {source} do not go together: {'; '.join(differences)}. Import into another collection."
        )
    written, sources = 0, set()
    batches = rows.iter(ROWS_PER_CALL)
    with tqdm(unit=" chunks", desc="import", disable=not progress) as bar:
        for batch in batches:
            try:
                chunks = [
                    Chunk(doc_id, index, tokens, continuation, json.loads(metadata))
                    for doc_id, index, tokens, continuation, metadata in zip(
                        *(batch[name] for name in ("doc_id", "chunk_index", "tokens", "continuation", "metadata")),
                        strict=True,
                    )
                ]
                embeddings = np.array(batch[VECTORS], dtype=np.float32) if identity.has_vectors else None
                texts = [str(text) for text in batch["text"]] if identity.has_words else None
                _check(chunks, embeddings, identity)
            except (ValueError, KeyError, TypeError) as error:
                raise KnowledgeBaseError(f"Rows {written} and following of {source} are damaged: {error}") from error
            store.upsert(chunks, embeddings, texts)
            sources |= source_names(chunks)
            written += len(chunks)
            bar.update(len(chunks))
    store.flush()
    store.touch(sources)
    store.adapt_index()
    return written


def _open_export(source: str) -> tuple[str, Any]:
    folder = Path(source)
    if folder.is_dir():
        stored, files = folder / "identity.json", sorted(map(str, folder.glob("data/*.parquet")))
        if not stored.is_file() or not files:
            raise KnowledgeBaseError(
                f"{folder} is no exported knowledge base: it needs identity.json and data/*.parquet."
            )
        return stored.read_text(), load_dataset("parquet", data_files=files, split="train", streaming=True)
    from huggingface_hub import hf_hub_download

    try:
        downloaded = hf_hub_download(source, "identity.json", repo_type="dataset")
        return Path(downloaded).read_text(), load_dataset(source, split="train", streaming=True)
    except Exception as error:
        raise KnowledgeBaseError(
            f"{source!r} is no exported folder, and no knowledge base on the hub ({error})."
        ) from error


def _check(chunks: list[Chunk], embeddings: np.ndarray | None, identity: Identity) -> None:
    """Raise ValueError unless an ingestion could have written these."""
    shape = (len(chunks), identity.embedding_dimension)
    if embeddings is not None and (embeddings.shape != shape or not np.isfinite(embeddings).all()):
        raise ValueError(f"embeddings are not all {identity.embedding_dimension} finite numbers.")
    for chunk in chunks:
        check_id(chunk.doc_id)
        tokens = [*chunk.tokens, *chunk.continuation]
        sizes = (1 <= len(chunk.tokens) <= identity.chunk_size, len(chunk.continuation) <= identity.chunk_size)
        if not all(sizes) or not 0 <= min(tokens) <= max(tokens) < identity.vocab_size:
            raise ValueError(f"chunk {chunk.index} of {chunk.doc_id!r} does not have a chunk's tokens.")
