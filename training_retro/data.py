"""The data of a training run: documents packed into sequences, before it trains, and neighbors stored with them."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk

from configuration_retro import RetroConfig
from retrieval import BulkTokenizer, MilvusRetriever
from retrieval.collator import NEIGHBOR_FIELDS, RetroDataCollator
from retrieval.packing import FEATURES, pack_documents, packed_dataset
from retrieval.streams import DocumentStream, mix

logger = logging.getLogger(__name__)

CHUNKS_SAMPLED = 8  # of a document
CARD = "neighbors.json"  # what the neighbors of a precomputed folder were found with
FORMAT = 3  # of the folder: from 2 on, with the neighbors' similarities; from 3 on, with a slot for every sequence


def pack_streams(
    streams: list[DocumentStream], tokenizer: BulkTokenizer, block_size: int, chunk_size: int, cache_dir: str | Path
) -> Dataset:
    """One pass over the mixture as sequences of block_size tokens, in its order, in an Arrow file."""

    def sequences() -> Iterator[dict]:
        return (sequence for sequence, _ in pack_documents(mix(streams), tokenizer, block_size, chunk_size))

    return packed_dataset(sequences, cache_dir)


def warn_of_own_text(
    samples: dict[str, list[dict[str, str]]], tokenizer: BulkTokenizer, retriever: MilvusRetriever
) -> None:
    """Say so where the knowledge base holds a source's text under other ids, so that its chunks would read themselves.

    Args:
        samples: some documents {"id", "text"} of each source; those shorter than a chunk tell nothing.
    """
    size = retriever.chunk_size
    seen = min(size, retriever.neighbor_length)
    for source, documents in samples.items():
        beginnings = [document["text"][: 20 * CHUNKS_SAMPLED * size] for document in documents]  # more than enough
        for document, tokens in zip(documents, tokenizer.encode_batch(beginnings), strict=True):
            chunks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)[:CHUNKS_SAMPLED]]
            if not chunks:
                continue
            found = retriever.retrieve(chunks, exclude_doc_ids=[{document["id"]}] * len(chunks))
            names = Counter(
                name
                for chunk, neighbors, theirs in zip(chunks, found.ids.tolist(), found.doc_ids, strict=True)
                for name in {name for ids, name in zip(neighbors, theirs, strict=True) if ids[:seen] == chunk[:seen]}
                if name is not None
            )
            name, copies = names.most_common(1)[0] if names else ("", 0)
            if 2 * copies > len(chunks):
                logger.warning(
                    "%s: the knowledge base has the text of %r in a document of another id, %r (%d of %d chunks). Its chunks then "
                    "read themselves, and what is learned, and measured, is to copy. Ids begin with the name of the file or "
                    "folder that was ingested, or are doc_id_field: use the same here, or leave copies of a text out.",
                    source,
                    document["id"],
                    name,
                    copies,
                    len(chunks),
                )
                break  # one is enough of a source


def card_of(tokenizer: BulkTokenizer, config: RetroConfig, block_size: int) -> dict[str, Any]:
    """Describe what sequences with neighbors are made for, and can be used with.

    They have special tokens in them, so that the whole tokenizer counts, unlike in a knowledge base.
    """
    sizes = {name: getattr(config, name) for name in ("chunk_size", "num_neighbors", "neighbor_length")}
    fingerprint = tokenizer.whole_fingerprint(len(tokenizer.hf_tokenizer))
    return {"format": FORMAT, "tokenizer": fingerprint, "block_size": block_size, **sizes}


def precompute(
    parts: dict[str, Dataset], retriever: MilvusRetriever, card: dict[str, Any], folder: str | os.PathLike
) -> None:
    """Store sequences with their chunks' neighbors, as Arrow files; the folder appears when all is there.

    Raises:
        FileExistsError: there is such a folder already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: precompute into a new folder, or delete it.")
    collator = RetroDataCollator(retriever)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)  # before all the retrieval: a folder that cannot be written would lose it

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
                name: part.map(find, batched=True, batch_size=64, features=features, new_fingerprint=uuid4().hex)
                for name, part in parts.items()
            }
        )
        stored.save_to_disk(str(draft))
        card = card | {"embedding_model": retriever.embedding_model, "collection_name": retriever.collection_name}
        (draft / CARD).write_text(json.dumps(card, indent=2), encoding="utf-8")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load_precomputed(folder: str | os.PathLike, card: dict[str, Any]) -> tuple[DatasetDict, dict[str, Any]]:
    """The sequences that `precompute` stored, and what they were found with.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: they were made for another tokenizer, block size or chunk grid; names both sides.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no precomputed neighbors (it has no {CARD}).")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    for name, value in card.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{folder} was precomputed with {name} {theirs.get(name)}, this run has {value}: use the same, or precompute again."
            )
    return load_from_disk(str(folder)), theirs
