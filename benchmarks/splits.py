"""Split a corpus by document: a knowledge base, sequences to train on, and held-out sequences."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from retrieval import BulkTokenizer, Document

NEAR_DUPLICATE = 0.7  # share of a document's lines that also stand in one other document
SHORTEST_LINE = 20  # characters; shorter lines stand in every document


@dataclass(frozen=True)
class SplitSize:
    """The size of a split.

    Attributes:
        chunks: of the knowledge base, at least; its last document is whole.
        chunk_size: tokens in a chunk.
        length: tokens in a sequence.
        training: sequences to train on.
        held_out: sequences to measure, each from a document of its own.
    """

    chunks: int = 6000
    chunk_size: int = 64
    length: int = 256
    training: int = 64
    held_out: int = 208


@dataclass
class Split:
    """A corpus, split by document.

    Attributes:
        knowledge: the documents of the knowledge base.
        training: (N, length) int64, cut from documents of the knowledge base.
        training_documents: N document ids, which the sequences' neighbors must not come from.
        held_out: (M, length) int64, cut from M documents that the knowledge base does not have.
    """

    knowledge: list[Document]
    training: np.ndarray
    training_documents: list[str]
    held_out: np.ndarray

    def save(self, folder: Path) -> None:
        """Write the split into a folder."""
        np.save(folder / "training.npy", self.training)
        np.save(folder / "held_out.npy", self.held_out)
        texts = [{"id": document.id, "text": document.text} for document in self.knowledge]
        (folder / "split.json").write_text(json.dumps({"documents": self.training_documents, "knowledge": texts}))

    @classmethod
    def load(cls, folder: Path) -> "Split":
        """Read the split that was written into a folder."""
        stored = json.loads((folder / "split.json").read_text())
        knowledge = [Document(text["id"], text["text"]) for text in stored["knowledge"]]
        training, held_out = (np.load(folder / f"{part}.npy") for part in ("training", "held_out"))
        return cls(knowledge, training, stored["documents"], held_out)


def without_near_duplicates(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents, leaving out each that mostly repeats the lines of an earlier one."""
    documents_of_line: defaultdict[str, list[str]] = defaultdict(list)
    for document in documents:
        lines = {line for line in map(str.strip, document.text.splitlines()) if len(line) >= SHORTEST_LINE}
        shared = Counter(earlier for line in lines for earlier in documents_of_line.get(line, ()))
        if max(shared.values(), default=0) <= NEAR_DUPLICATE * len(lines):
            for line in lines:
                documents_of_line[line].append(document.id)
            yield document


def separate(
    documents: Iterable[Document], tokenizer: BulkTokenizer, size: SplitSize, draw: random.Random
) -> tuple[list[tuple[Document, list[int]]], list[tuple[Document, list[int]]]]:
    """Return the held-out documents and those of the knowledge base, each with its tokens.

    Documents shorter than a sequence are left out, and so are near-duplicates.

    Args:
        draw: draws the documents' order.

    Raises:
        ValueError: there are too few documents.
    """
    shuffled = list(documents)
    draw.shuffle(shuffled)
    kept = list(without_near_duplicates(shuffled))
    tokens = zip(kept, tokenizer.encode_batch([document.text for document in kept]), strict=True)
    long_enough = [(document, ids) for document, ids in tokens if len(ids) >= size.length]
    held_out, rest = long_enough[: size.held_out], long_enough[size.held_out :]
    knowledge: list[tuple[Document, list[int]]] = []
    chunks = 0
    while rest and chunks < size.chunks:
        knowledge.append(rest.pop(0))
        chunks += -(-len(knowledge[-1][1]) // size.chunk_size)
    if chunks < size.chunks:
        raise ValueError(
            f"The corpus has {len(long_enough)} different documents of {size.length} tokens or more, too few for "
            f"{size} ({chunks} chunks were left). Ask for fewer."
        )
    return held_out, knowledge


def split_corpus(documents: Iterable[Document], tokenizer: BulkTokenizer, size: SplitSize) -> Split:
    """Split a corpus by document, as [`separate`] does, and cut sequences from the documents.

    Raises:
        ValueError: there are too few documents.
    """
    draw = random.Random(0)
    held_out, knowledge = separate(documents, tokenizer, size, draw)

    def cut(ids: list[int]) -> list[int]:
        start = draw.randint(0, len(ids) - size.length)
        return ids[start : start + size.length]

    read = [knowledge[number % len(knowledge)] for number in range(size.training)]
    return Split(
        [document for document, _ in knowledge],
        np.array([cut(ids) for _, ids in read], dtype=np.int64),
        [document.id for document, _ in read],
        np.array([cut(ids) for _, ids in held_out], dtype=np.int64),
    )


def load_or_make(
    folder: Path, documents: Callable[[], Iterable[Document]], tokenizer: BulkTokenizer, size: SplitSize
) -> Split:
    """Return the split in a folder, which is made first if it is missing.

    Args:
        documents: makes the corpus; called only if there is no split yet.

    Raises:
        ValueError: the corpus is too small, or the folder has a split of another size.
    """
    made_with = folder / "size.json"
    if not made_with.exists():
        folder.mkdir(parents=True, exist_ok=True)
        split_corpus(documents(), tokenizer, size).save(folder)
        made_with.write_text(json.dumps(asdict(size)))
    if (made := json.loads(made_with.read_text())) != asdict(size):
        raise ValueError(f"{folder} has a split of {made}, not of {asdict(size)}. Name another folder.")
    return Split.load(folder)
