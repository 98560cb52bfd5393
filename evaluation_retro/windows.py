"""Cut windows of equal length from documents, one from each."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from retrieval import BulkTokenizer, Document, Source, read_documents
from retrieval.settings import same_setting

from .bits_per_byte import byte_lengths


@dataclass
class TextSettings:
    """The documents that are measured; fields for `HfArgumentParser`, to inherit.

    Raises:
        ValueError: a number is out of its range.
    """

    texts: list[str] = field(
        default_factory=list, metadata={"help": "Held-out text: files, folders, or names of datasets."}
    )
    text_field: str = same_setting(Source, "text_field")
    doc_id_field: str | None = same_setting(Source, "doc_id_field")
    window: int = field(default=256, metadata={"help": "Tokens in a window, the most that any position can see."})
    windows: int = field(default=256, metadata={"help": "Windows to measure at most, each from a document of its own."})
    seed: int = field(
        default=0, metadata={"help": "Seed that draws the documents, the places in them, and shuffled neighbors."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):  # a single one in YAML, not in a list
            self.texts = [self.texts]
        for name, least in (("window", 2), ("windows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}. Give at least {least}.")

    def documents(self, names: list[str] | None = None) -> Iterator[Document]:
        """Read the documents of `texts`, or of other sources with the same fields."""
        return read_texts(names or self.texts, self.text_field, self.doc_id_field)


def read_texts(names: list[str], text_field: str, doc_id_field: str | None) -> Iterator[Document]:
    """Read the documents of files, folders or datasets.

    Raises:
        ValueError: there are no names.
        OSError: a source cannot be read.
    """
    if not names:
        raise ValueError("texts is empty. Name the files, folders or datasets to measure.")
    return read_documents(*(Source(name, text_field=text_field, doc_id_field=doc_id_field) for name in names))


@dataclass
class Windows:
    """Windows of equal length, each from a document of its own.

    Attributes:
        tokens: (N, T) int64.
        doc_ids: N ids of the documents.
    """

    tokens: torch.Tensor
    doc_ids: list[str]

    def __len__(self) -> int:
        return len(self.tokens)

    def fingerprint(self) -> str:
        """Return a hash of the tokens and of the documents' ids."""
        content = self.tokens.numpy().tobytes() + "\0".join(self.doc_ids).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def text_bytes(self, tokenizer: BulkTokenizer, first: int) -> np.ndarray:
        """Count the UTF-8 bytes (N,) of each window's tokens from `first` on."""
        return byte_lengths(tokenizer.hf_tokenizer)[self.tokens[:, first:]].sum(1).numpy()


def draw_windows(
    documents: Iterable[Document], tokenizer: BulkTokenizer, settings: TextSettings, name: str = "texts"
) -> Windows:
    """Draw documents, and a window at a random place of each.

    Equal documents and settings give equal windows.

    Args:
        documents: to draw from.
        tokenizer: the model's.
        settings: how many windows, and how long.
        name: the setting that names the documents, for messages.

    Raises:
        ValueError: every document is shorter than a window, or there is none.
    """
    kept = list(documents)
    draw = random.Random(settings.seed)
    draw.shuffle(kept)
    encoded = tokenizer.encode_batch([document.text for document in kept])
    long_enough = [place for place, ids in enumerate(encoded) if len(ids) >= settings.window][: settings.windows]
    if not long_enough:
        longest = max(map(len, encoded), default=0)
        raise ValueError(
            f"None of {name} is as long as a window of {settings.window} tokens: there are {len(kept)} documents, and "
            f"the longest has {longest} tokens. Give longer texts, or a smaller --window."
        )
    rows = []
    for place in long_enough:
        start = draw.randint(0, len(encoded[place]) - settings.window)
        rows.append(encoded[place][start : start + settings.window])
    return Windows(torch.tensor(rows), [kept[place].id for place in long_enough])
