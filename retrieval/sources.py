"""Documents from where they lie: text files, folders, JSONL files and `datasets` datasets."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .chunking import Document

logger = logging.getLogger(__name__)


def source_name(source: str) -> str:
    """What a source is called in ids and metadata: a file's or folder's own name, or that of a dataset."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def read_documents(
    source: str, text_field: str = "text", doc_id_field: str | None = None, metadata_fields: Sequence[str] = ()
) -> Iterator[Document]:
    """Documents of one source, one at a time. Each carries the source's name as metadata "source".

    Args:
        source: a folder (every text file below it but hidden ones; the id is the folder's name and the path in it), a
            .jsonl file (one document a line), another file (one document; the id is its name), or a dataset of the hub
            (streamed, split "train").
        text_field: the field of a JSONL line or dataset row with the text.
        doc_id_field: the field with the id; default: the source's name and the number of the line or row.
        metadata_fields: fields of a line or row that become the document's metadata; where one is null it has none.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: a line is not JSON, or a field is missing.
    """
    path, name = Path(source), source_name(source)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden:
                yield from _text_file(file, f"{name}/{file.relative_to(path).as_posix()}", name)
    elif path.is_file() and path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            rows = (
                _json_line(line, f"{source}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
            )
            yield from documents_from_rows(rows, name, text_field, doc_id_field, metadata_fields)
    elif path.is_file():
        yield from _text_file(path, name, name)
    else:
        from datasets import load_dataset

        try:
            rows = load_dataset(source, split="train", streaming=True)
        except Exception as error:
            raise FileNotFoundError(
                f"{source!r} is no file, no folder, and no dataset that can be loaded ({type(error).__name__}: {error})."
            ) from error
        yield from documents_from_rows(rows, name, text_field, doc_id_field, metadata_fields)


def read_all(
    sources: Sequence[str],
    text_field: str = "text",
    doc_id_field: str | None = None,
    metadata_fields: Sequence[str] = (),
) -> Iterator[Document]:
    """Documents of several sources, one after the other; arguments as for [`read_documents`].

    Raises:
        ValueError: two sources have the same name, so that documents of one could replace those of the other.
    """
    named: dict[str, str] = {}
    for source in sources:
        other = named.setdefault(source_name(source), source)
        if other is not source:
            raise ValueError(
                f"{other} and {source} have the same name, which their documents' ids begin with. Rename one, or give a "
                "folder that holds both."
            )
    for source in sources:
        yield from read_documents(source, text_field, doc_id_field, metadata_fields)


def documents_from_rows(
    rows: Iterable[Mapping[str, Any]],
    name: str,
    text_field: str = "text",
    doc_id_field: str | None = None,
    metadata_fields: Sequence[str] = (),
) -> Iterator[Document]:
    """Documents from mappings, such as the rows of any `datasets` dataset; `name` is part of ids that are made up."""
    for number, row in enumerate(rows):
        for needed in (text_field, doc_id_field, *metadata_fields):
            if needed is not None and needed not in row:
                raise ValueError(f"Row {number} of {name} has no field {needed!r}; it has {', '.join(map(repr, row))}.")
        if not isinstance(row[text_field], str):
            raise ValueError(f"Row {number} of {name}: field {text_field!r} is {row[text_field]!r}, not text.")
        id_ = f"{name}#{number}" if doc_id_field is None else str(row[doc_id_field])
        metadata = {field: _storable(row[field]) for field in metadata_fields if row[field] is not None}
        yield Document(id_, row[text_field], {"source": name, **metadata})


def _storable(value: Any) -> Any:
    """Dates as `datasets` gives them become ISO text; all else is left to be checked."""
    return value.isoformat() if hasattr(value, "isoformat") else value


def _text_file(file: Path, id_: str, source: str) -> Iterator[Document]:
    try:
        text = file.read_bytes().decode()  # not read_text, which would turn \r\n into \n
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        logger.warning("Skipped %s: it is not UTF-8 text.", file)
    else:
        yield Document(id_, text, {"source": source})


def _json_line(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with fields, got {type(row).__name__}.")
    return row
