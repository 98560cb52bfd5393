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
from .first_points import FirstPoints

REQUIREMENTS = "neighbors.json"  # the file that says how the neighbors of a folder were found
# the folder's; 2 added the neighbors' similarities, 3 a slot for every sequence, 4 other grids
FORMAT = 4
PAPERS_GRID_FORMAT = 3  # the last format that had no other grid than the paper's
SEQUENCES_PER_SEARCH = 64


def requirements_of(
    tokenizer: BulkTokenizer, config: RetroConfig, block_size: int, first_points: FirstPoints | None = None
) -> dict[str, Any]:
    """Return the requirements of sequences with neighbors: tokenizer, sizes and retrieval grid.

    Unlike the rows of a knowledge base, sequences contain special tokens, so the whole tokenizer
    counts. `first_point_seed` is None for the paper's grid.
    """
    names = ("chunk_size", "num_neighbors", "neighbor_length", "retrieval_stride")
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.whole_fingerprint(len(tokenizer.hf_tokenizer)),
        "block_size": block_size,
        **{name: getattr(config, name) for name in names},
        "first_point_seed": None if first_points is None else first_points.seed,
        **({} if tokenizer.bos_token_id is None else {"begin_of_text_id": tokenizer.bos_token_id}),
    }


def precompute(
    parts: dict[str, Dataset], retriever: MilvusRetriever, requirements: dict[str, Any], folder: str | os.PathLike
) -> None:
    """Store sequences with the neighbors of their retrieval points as Arrow files.

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
    collator = RetroDataCollator(retriever, requirements["retrieval_stride"])
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)  # before the searches, which a folder that cannot be written would lose

    def find(batch: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = collator.neighbors_of(rows)
        return {name: [row[name].tolist() for row in found] for name in NEIGHBOR_FIELDS}

    ids, mask, scores = List(List(List(Value("int32")))), List(List(List(Value("bool")))), List(List(Value("float32")))
    added = dict(zip(NEIGHBOR_FIELDS, (ids, mask, scores), strict=True))
    try:
        stored = DatasetDict(
            {
                name: part.map(
                    find,
                    batched=True,
                    batch_size=SEQUENCES_PER_SEARCH,
                    features=Features({**part.features, **added}),
                    new_fingerprint=uuid4().hex,
                )
                for name, part in parts.items()
            }
        )
        stored.save_to_disk(str(draft))
        requirements = requirements | {
            "embedding_model": retriever.embedding_model,
            "search": retriever.search,
            "collection_name": retriever.collection_name,
        }
        (draft / REQUIREMENTS).write_text(json.dumps(requirements, indent=2), encoding="utf-8")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_precomputed(folder: str | os.PathLike, requirements: dict[str, Any]) -> tuple[DatasetDict, dict[str, Any]]:
    """Load what [`precompute`] stored.

    Args:
        folder: the folder.
        requirements: as made by [`requirements_of`], or some of them.

    Returns:
        the sequences by part, and the folder's requirements.

    Raises:
        FileNotFoundError: the folder holds no precomputed neighbors.
        ValueError: they were made for another tokenizer, block size or retrieval grid. The message
            names both sides.
    """
    path = Path(folder) / REQUIREMENTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no precomputed neighbors (it has no {REQUIREMENTS}).")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    if theirs.get("format") == PAPERS_GRID_FORMAT:
        theirs |= {"format": FORMAT, "retrieval_stride": theirs["chunk_size"], "first_point_seed": None}
    for name, value in requirements.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{folder} was precomputed with {name} {theirs.get(name)}, this run has {value}. Use the same, or "
                "precompute again."
            )
    return load_from_disk(str(folder)), theirs
