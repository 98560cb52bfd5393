"""Read documents from files, folders and `datasets` datasets, and check every row."""

import logging
import numbers
import os
import reprlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import load_dataset

from .chunking import Document
from .files import FILE_ID, ROW_ID, Row, read_file, read_folder, readable
from .hashing import hash64

logger = logging.getLogger(__name__)

BUSY = {408, 429, 500, 502, 503, 504}  # HTTP statuses that are worth another try


@dataclass(frozen=True)
class Source:
    """A place that documents are read from: a file, a folder, or a dataset on the Hub.

    A file's suffix tells its format: rows in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow
    and .feather, otherwise one text. A further .gz, .bz2, .xz or .zst is decompressed. A folder is
    all files below it except hidden ones; see [`retrieval.files.read_folder`]. A dataset is
    streamed.

    Attributes:
        dataset: path of a file or folder, or name of a dataset.
        subset: a dataset's configuration, such as "20231101.en".
        split: a dataset's part.
        text_field: the field of a row that holds the text. In a folder, a file that may or may not
            hold rows is read as rows only if it has this field.
        doc_id_field: the field of a row that holds the document's id, a text or a whole number.
            Default: ids are the source's name and the row's number.
        metadata_fields: fields of a row that become the document's metadata. A value that is null
            or NaN is left out.

    Raises:
        ValueError: an attribute has the wrong type or is empty.
    """

    dataset: str = field(metadata={"help": "A file, a folder, or the name of a dataset on the Hub."})
    subset: str | None = field(default=None, metadata={"help": "Subset (configuration) of a dataset on the Hub."})
    split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    text_field: str = field(default="text", metadata={"help": "Field of a row that holds the text."})
    doc_id_field: str | None = field(
        default=None,
        metadata={
            "help": "Field of a row that holds the document's id, a text or a whole number; use the same one for the "
            "knowledge base and for training. Without it, ids are the source's name and the row's number."
        },
    )
    metadata_fields: Sequence[str] = field(
        default=(), metadata={"help": "Fields of a row that are stored as metadata, for filters."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, str) or not self.dataset:
            raise ValueError(f"A data source needs the name of its dataset, file or folder; it is {self.dataset!r}.")
        for name in ("subset", "split", "text_field", "doc_id_field"):
            value = getattr(self, name)
            optional = name in ("subset", "doc_id_field")
            if not (isinstance(value, str) and value or (optional and value is None)):
                raise ValueError(f"{self.where}{name} is {value!r}. Give a text that is not empty.")
        fields = self.metadata_fields
        if isinstance(fields, str) or not all(isinstance(name, str) for name in fields):
            raise ValueError(f"{self.where}metadata_fields is {fields!r}. Give a list of names.")

    @property
    def where(self) -> str:
        """The beginning of an error message about this source."""
        return f"Data source {self.dataset!r}: "

    @property
    def name(self) -> str:
        """The name in ids and metadata: the file's or folder's, or the dataset's and subset's."""
        path = Path(self.dataset)
        if path.exists():
            return readable(path.resolve().name)
        return self.dataset if self.subset is None else f"{self.dataset}/{self.subset}"

    def rows(self) -> Iterable[Row]:
        """Read the rows in their order. A text file is one row, which carries its id.

        Raises:
            FileNotFoundError: there is no such file, folder or dataset.
            ValueError: a file cannot be read; the message names it.
            Exception: a network error; retry it. [`is_of_the_network`] recognizes these errors.
        """
        path = Path(self.dataset)
        if path.is_dir():
            return read_folder(path, self.name, self.text_field)
        if path.is_file():
            return read_file(path, self.name)
        if path.exists():
            raise ValueError(
                f"Cannot read {self.dataset!r}: it is not a regular file. Write its content to a file, whose name "
                "becomes the id."
            )
        if path.is_symlink():
            raise FileNotFoundError(f"Cannot read {self.dataset!r}: it is a broken link.")
        try:
            return load_dataset(self.dataset, self.subset, split=self.split, streaming=True)
        except Exception as error:
            if is_of_the_network(error):
                raise
            raise FileNotFoundError(
                f"Cannot load {self.dataset!r}: no such file or folder, and no dataset of that name can be loaded "
                f"({type(error).__name__}: {error})."
            ) from error


def same_name(one: str, other: str) -> ValueError:
    """Return the error raised when two sources share a name."""
    return ValueError(
        f"{one} and {other} have the same name, which the ids of their documents begin with. Rename one, or name a "
        "folder that holds both."
    )


def is_of_the_network(error: BaseException) -> bool:
    """Return True for transient network errors: timeouts, lost connections, 429 and 5xx."""
    # requests', httpx's and huggingface_hub's errors are recognized by the names of their base
    # classes
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in BUSY
    if isinstance(error, ConnectionError | TimeoutError) or names & {"RequestException", "TransportError"}:
        return True
    cause = error.__cause__ or error.__context__  # `datasets` says "not found" when the Hub does not answer
    return cause is not None and is_of_the_network(cause)


def read_documents(*sources: str | os.PathLike | Source) -> Iterator[Document]:
    """Read the documents of one or several sources, one after the other.

    Each document carries its source's name as metadata "source". A row that comes again with the
    same id, text and metadata is left out; the number of such rows is logged.

    Args:
        *sources: names of files, folders or datasets; a [`Source`] names fields, subset and split,
            too.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: a file cannot be read; a field of a row is missing or has a wrong value; two
            rows have the same id, or two sources the same name. The message names the rows or
            sources.
    """
    chosen = [source if isinstance(source, Source) else Source(os.fspath(source)) for source in sources]
    named: dict[str, Source] = {}
    for source in chosen:
        other = named.setdefault(source.name, source)
        if other is not source:
            raise same_name(other.dataset, source.dataset)

    def placed() -> Iterator[tuple[str, Document]]:
        for source in chosen:
            place = None
            for place, document in _placed_documents(enumerate(source.rows()), source, source.name):
                yield place, document
            if place is None:
                logger.warning("%s holds no document.", source.dataset)

    return _without_repeats(placed())


def documents_from_rows(rows: Iterable[Row], source: str | Source) -> Iterator[Document]:
    """Make documents from mappings, such as the rows of any `datasets` dataset.

    Args:
        rows: the mappings.
        source: the name that ids begin with, or a [`Source`] with that name as its `dataset`. Its
            `text_field`, `doc_id_field` and `metadata_fields` say what is read.

    Raises:
        ValueError: as for [`read_documents`].
    """
    source = source if isinstance(source, Source) else Source(source)
    return _without_repeats(_placed_documents(enumerate(rows), source, source.dataset))


def documents_from_numbered_rows(rows: Iterable[tuple[int, Row]], source: Source) -> Iterator[Document]:
    """Make documents from numbered rows of a source. The same row may come again."""
    return (document for _, document in _placed_documents(rows, source, source.name))


def at_least_one(documents: Iterator[Document], sources: Sequence[str]) -> Iterator[Document]:
    """Return the documents unchanged if one of them has a text.

    Args:
        documents: read up to the first one with a text.
        sources: their names, for the error message.

    Raises:
        ValueError: no document has a text.
    """
    empty: list[Document] = []
    for document in documents:
        if document.text:
            return chain(empty, [document], documents)
        empty.append(document)
    raise ValueError(
        f"Nothing was read: there is no text in {', '.join(sources)} ({len(empty)} empty documents). Hidden files are "
        "skipped; the log names other skipped files."
    )


def _placed_documents(
    rows: Iterable[tuple[int, Row]], source: Source, source_name: str
) -> Iterator[tuple[str, Document]]:
    """Yield each row's document, with the name of the row for error messages."""
    id_fields = [] if source.doc_id_field is None else [source.doc_id_field]
    needed = [source.text_field, *id_fields, *source.metadata_fields]
    for number, row in rows:
        if FILE_ID in row:
            yield row[FILE_ID], Document(row[FILE_ID], row["text"], {"source": source_name})
            continue
        own = row.get(ROW_ID, f"{source_name}#{number}")
        place = _place(own)
        if missing := [name for name in needed if name not in row]:
            there = ", ".join(repr(name) for name in row if name != ROW_ID)
            raise ValueError(f"{place} has no field {missing[0]!r}; it has {there}.")
        text = row[source.text_field]
        if not isinstance(text, str):
            raise ValueError(f"{place}: field {source.text_field!r} is {reprlib.repr(text)}, not text.")
        id_ = own if source.doc_id_field is None else _id(row[source.doc_id_field], source.doc_id_field, place)
        values = {name: _storable(row[name]) for name in source.metadata_fields}
        metadata = {name: value for name, value in values.items() if value is not None}
        try:
            yield place, Document(id_, text, {"source": source_name, **metadata})
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _id(value: Any, field_name: str, place: str) -> str:
    """Return a row's id as text; raise ValueError unless it is a text or a whole number."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    raise ValueError(
        f"{place}: the id, field {field_name!r}, is {reprlib.repr(value)}. An id must be a text that is not blank, or "
        "a whole number. Give every row one, or leave doc_id_field out to number the rows."
    )


def _place(row_id: str) -> str:
    """Return the place of a numbered row for a message: "Row 3 of rows.jsonl"."""
    source_name, _, number = row_id.rpartition("#")
    return f"Row {number} of {source_name}"


def _storable(value: Any) -> Any:
    """Convert a metadata value: null, NaN and NaT to None, dates to ISO text, numpy's types."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    if isinstance(value, np.generic):
        value = value.item()
    return value.isoformat() if hasattr(value, "isoformat") else value


def _without_repeats(placed: Iterable[tuple[str, Document]]) -> Iterator[Document]:
    """Yield the documents, leaving out exact repeats.

    Hashes of all that was read are kept in a temporary file, since there may be billions.

    Raises:
        ValueError: two documents have the same id and differ; the message names their places.
        OSError: there is no room for the hashes.
    """
    repeats = 0
    with closing(sqlite3.connect("", check_same_thread=False)) as seen:
        seen.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE seen (id INTEGER PRIMARY KEY, content INTEGER, place TEXT);"
        )
        for place, document in placed:
            id_, content = hash64(document.id), hash64(repr((document.text, sorted(document.metadata.items()))))
            try:
                is_new = seen.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", (id_, content, place)).rowcount
            except sqlite3.OperationalError as error:
                raise OSError(
                    f"Cannot keep the ids of what was read in a temporary file ({error}). Make room in the temporary "
                    "folder, or name another one in SQLITE_TMPDIR or TMPDIR."
                ) from error
            if is_new:
                yield document
                continue
            there, first = seen.execute("SELECT content, place FROM seen WHERE id = ?", (id_,)).fetchone()
            if there != content:
                raise ValueError(
                    f"{first} and {place} have the same id, {reprlib.repr(document.id)}, and differ: the later one "
                    "would replace the earlier one. Give each its own id, or leave doc_id_field out. To replace a "
                    "document, ingest the new version in a second run."
                )
            repeats += 1
    if repeats:
        logger.warning("Left out %d rows that have the same id, text and metadata as an earlier one.", repeats)
