"""Documents from where they lie: files, folders and `datasets` datasets, each row checked before it becomes one."""

import logging
import numbers
import reprlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
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

BUSY = {408, 429, 500, 502, 503, 504}  # a server's answers that pass by themselves


def source_name(source: str, subset: str | None = None) -> str:
    """Return a source's name in ids and metadata: a file's or folder's own name, or a dataset's with its subset's."""
    path = Path(source)
    if path.exists():
        return readable(path.resolve().name)
    return source if subset is None else f"{source}/{subset}"


def same_name(one: str, other: str) -> ValueError:
    """Return the error raised when two sources share a name."""
    return ValueError(
        f"{one} and {other} have the same name, which their documents' ids begin with. Rename one, or give a "
        "folder that holds both."
    )


def read_rows(source: str, subset: str | None = None, split: str = "train", text_field: str = "text") -> Iterable[Row]:
    """Read the rows of one source, in their order; a text file is one row, which carries its id.

    Args:
        source: a file, a folder or the name of a dataset on the hub, which is streamed. A file's suffix tells what it is:
            rows in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow or .feather, and otherwise one text; .gz, .bz2,
            .xz or .zst may follow. A folder is all files below it but hidden ones (see [`retrieval.files.read_folder`]).
        subset, split: for a dataset of the hub.
        text_field: the field of a row with the text; files of a folder that only may have rows are known by it.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: a file cannot be read; names it.
        Exception: of the network, as [`is_of_the_network`] knows it: worth another try.
    """
    path = Path(source)
    if path.is_dir():
        return read_folder(path, source_name(source), text_field)
    if path.is_file():
        return read_file(path, source_name(source))
    if path.exists():
        raise ValueError(
            f"Cannot read {source!r}: it is not a regular file. Write it to a file, whose name becomes the id."
        )
    if path.is_symlink():
        raise FileNotFoundError(f"Cannot read {source!r}: it is a broken link.")
    try:
        return load_dataset(source, subset, split=split, streaming=True)
    except Exception as error:
        if is_of_the_network(error):
            raise
        raise FileNotFoundError(
            f"Cannot load {source!r}: no such file or folder, and no dataset of that name can be loaded "
            f"({type(error).__name__}: {error})."
        ) from error


def is_of_the_network(error: BaseException) -> bool:
    """Return True for transient network errors: timeouts, lost connections, 429 and 5xx."""
    # requests' and httpx's errors, and huggingface_hub's, are told by the families they belong to
    names = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in BUSY
    if isinstance(error, ConnectionError | TimeoutError) or names & {"RequestException", "TransportError"}:
        return True
    behind = error.__cause__ or error.__context__  # `datasets` says "not found" of a hub that does not answer, too
    return behind is not None and is_of_the_network(behind)


def read_documents(
    source: str,
    text_field: str = "text",
    doc_id_field: str | None = None,
    metadata_fields: Sequence[str] = (),
    subset: str | None = None,
    split: str = "train",
) -> Iterator[Document]:
    """Read the documents of one source, one at a time. Arguments and errors are those of [`read_all`]."""
    return read_all([source], text_field, doc_id_field, metadata_fields, subset, split)


def read_all(
    sources: Sequence[str],
    text_field: str = "text",
    doc_id_field: str | None = None,
    metadata_fields: Sequence[str] = (),
    subset: str | None = None,
    split: str = "train",
) -> Iterator[Document]:
    """Read the documents of sources, one after the other. Each carries its source's name as metadata "source".

    A row that comes again, with the same id, text and metadata, is left out; how many is logged.

    Args:
        sources, subset, split: as for [`read_rows`].
        text_field: the field of a row with the text.
        doc_id_field: the field with the id, a text or a whole number; default: the source's name and the number of the row.
        metadata_fields: fields of a row that become the document's metadata; where one is null or NaN it has none.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: a file cannot be read; a field of a row is missing or not what it must be; two rows have the same id;
            or two sources have the same name. Names the rows or sources.
    """
    named: dict[str, str] = {}
    for source in sources:
        other = named.setdefault(source_name(source), source)
        if other is not source:
            raise same_name(other, source)

    def placed() -> Iterator[tuple[str, Document]]:
        for source in sources:
            rows = enumerate(read_rows(source, subset, split, text_field))
            name, place = source_name(source, subset), None
            for place, document in _placed_documents(rows, name, text_field, doc_id_field, metadata_fields):
                yield place, document
            if place is None:
                logger.warning("%s holds no document.", source)

    return _without_repeats(placed())


def documents_from_rows(
    rows: Iterable[Row],
    name: str,
    text_field: str = "text",
    doc_id_field: str | None = None,
    metadata_fields: Sequence[str] = (),
) -> Iterator[Document]:
    """Make documents from mappings, such as the rows of any `datasets` dataset.

    Args:
        name: the source's, which ids that are made up begin with.
        text_field, doc_id_field, metadata_fields: as for [`read_all`], which also tells what is raised.
    """
    return _without_repeats(_placed_documents(enumerate(rows), name, text_field, doc_id_field, metadata_fields))


def documents_from_numbered_rows(
    rows: Iterable[tuple[int, Row]], name: str, text_field: str = "text", doc_id_field: str | None = None
) -> Iterator[Document]:
    """Make documents from some of a source's rows, each with its number in it. The same row may come again."""
    return (document for _, document in _placed_documents(rows, name, text_field, doc_id_field))


def at_least_one(documents: Iterator[Document], sources: Sequence[str]) -> Iterator[Document]:
    """Return the documents, of which one must have a text.

    Raises:
        ValueError: none has.
    """
    empty = []
    for document in documents:
        if document.text:
            return chain(empty, [document], documents)
        empty.append(document)
    raise ValueError(
        f"Nothing was read: there is no text in {', '.join(sources)} ({len(empty)} empty documents). Hidden files are not "
        "read, and what else was skipped is named above."
    )


def _placed_documents(
    rows: Iterable[tuple[int, Row]],
    name: str,
    text_field: str = "text",
    doc_id_field: str | None = None,
    metadata_fields: Sequence[str] = (),
) -> Iterator[tuple[str, Document]]:
    """Yield each row's place, for messages, and its document."""
    for number, row in rows:
        if FILE_ID in row:
            yield row[FILE_ID], Document(row[FILE_ID], row["text"], {"source": name})
            continue
        own = row.get(ROW_ID, f"{name}#{number}")
        place = _place(own)
        for needed in (text_field, doc_id_field, *metadata_fields):
            if needed is not None and needed not in row:
                there = ", ".join(repr(field) for field in row if field != ROW_ID)
                raise ValueError(f"{place} has no field {needed!r}; it has {there}.")
        if not isinstance(row[text_field], str):
            raise ValueError(f"{place}: field {text_field!r} is {reprlib.repr(row[text_field])}, not text.")
        id_ = own if doc_id_field is None else _id(row[doc_id_field], doc_id_field, place)
        values = {field: _storable(row[field]) for field in metadata_fields}
        metadata = {field: value for field, value in values.items() if value is not None}
        try:
            yield place, Document(id_, row[text_field], {"source": name, **metadata})
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _id(value: Any, field: str, place: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    raise ValueError(
        f"{place}: the id, field {field!r}, is {reprlib.repr(value)}. An id must be a text that is not blank, or a whole "
        "number: give every row one, or leave doc_id_field out, and each row has its number."
    )


def _place(row_id: str) -> str:
    """Return how an id that was made up reads in a message."""
    source, _, number = row_id.rpartition("#")
    return f"Row {number} of {source}"


def _storable(value: Any) -> Any:
    """Return what is stored of a metadata value: None for null, NaN and NaT, ISO text for a date; the rest is checked later."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    if isinstance(value, np.generic):
        value = value.item()
    return value.isoformat() if hasattr(value, "isoformat") else value


def _without_repeats(placed: Iterable[tuple[str, Document]]) -> Iterator[Document]:
    """Yield documents with ids of their own; hashes of what was read are kept on disk, as there may be billions.

    Raises:
        ValueError: two have the same id, but another text or metadata; names their places.
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
                    f"The ids that were read cannot be kept in a temporary file ({error}). Make room in the temporary "
                    "folder, or name another one in SQLITE_TMPDIR or TMPDIR."
                ) from error
            if is_new:
                yield document
                continue
            there, first = seen.execute("SELECT content, place FROM seen WHERE id = ?", (id_,)).fetchone()
            if there != content:
                raise ValueError(
                    f"{first} and {place} have the same id, {reprlib.repr(document.id)}, and differ: "
                    "the later one would replace the earlier one. Give each an id of its own, or leave doc_id_field out. "
                    "To replace a document, ingest the new version in a second run."
                )
            repeats += 1
    if repeats:
        logger.warning("Left out %d rows that have the same id, text and metadata as an earlier one.", repeats)
