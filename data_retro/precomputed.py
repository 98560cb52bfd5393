"""Precomputed neighbors: store sequences with their neighbors, and load them again."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk

from configuration_retro import RetroConfig
from retrieval import BulkTokenizer, MilvusRetriever

from .collator import NEIGHBOR_FIELDS, RetroDataCollator
from .packing import FEATURES

REQUIREMENTS = "neighbors.json"  # the file that says how the neighbors of a folder were found
FORMAT = 3  # of the folder; 2 added the neighbors' similarities, 3 a slot for every sequence
SEQUENCES_PER_SEARCH = 64


def requirements_of(tokenizer: BulkTokenizer, config: RetroConfig, block_size: int) -> dict[str, Any]:
    """Return the requirements of sequences with neighbors: their tokenizer and their sizes.

    Unlike the rows of a knowledge base, sequences contain special tokens, so the whole tokenizer
    counts.
    """
    sizes = {name: getattr(config, name) for name in ("chunk_size", "num_neighbors", "neighbor_length")}
    fingerprint = tokenizer.whole_fingerprint(len(tokenizer.hf_tokenizer))
    return {"format": FORMAT, "tokenizer": fingerprint, "block_size": block_size, **sizes}


def precompute(
    parts: dict[str, Dataset], retriever: MilvusRetriever, requirements: dict[str, Any], folder: str | os.PathLike
) -> None:
    """Store sequences with the neighbors of their chunks as Arrow files.

    The folder appears when it is complete.

    Args:
        parts: the packed sequences, by the name of the part ("train", "validation").
        retriever: finds the neighbors.
        requirements: as made by [`requirements_of`].
        folder: a new folder.

    Raises:
        FileExistsError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already. Precompute into a new folder, or delete it.")
    collator = RetroDataCollator(retriever)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)  # before the searches, which a folder that cannot be written would lose

    def find(batch: dict[str, list]) -> dict[str, list]:
        rows = [
            {"input_ids": ids, "doc_ids": docs} for ids, docs in zip(batch["input_ids"], batch["doc_ids"], strict=True)
        ]
        found = collator.neighbors_of(rows)
        return {name: [row[name].tolist() for row in found] for name in NEIGHBOR_FIELDS}

    ids, mask, scores = List(List(List(Value("int32")))), List(List(List(Value("bool")))), List(List(Value("float32")))
    features = Features({**FEATURES, **dict(zip(NEIGHBOR_FIELDS, (ids, mask, scores), strict=True))})
    try:
        stored = DatasetDict(
            {
                name: part.map(
                    find,
                    batched=True,
                    batch_size=SEQUENCES_PER_SEARCH,
                    features=features,
                    new_fingerprint=uuid4().hex,
                )
                for name, part in parts.items()
            }
        )
        stored.save_to_disk(str(draft))
        requirements = requirements | {
            "embedding_model": retriever.embedding_model,
            "collection_name": retriever.collection_name,
        }
        (draft / REQUIREMENTS).write_text(json.dumps(requirements, indent=2), encoding="utf-8")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_precomputed(folder: str | os.PathLike, requirements: dict[str, Any]) -> tuple[DatasetDict, dict[str, Any]]:
    """Load what [`precompute`] stored.

    Returns:
        the sequences by part, and the folder's requirements.

    Raises:
        FileNotFoundError: the folder holds no precomputed neighbors.
        ValueError: they were made for another tokenizer, block size or chunk grid. The message
            names both sides.
    """
    path = Path(folder) / REQUIREMENTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no precomputed neighbors (it has no {REQUIREMENTS}).")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    for name, value in requirements.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{folder} was precomputed with {name} {theirs.get(name)}, this run has {value}. Use the same, or "
                "precompute again."
            )
    return load_from_disk(str(folder)), theirs
