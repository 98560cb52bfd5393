"""Documents from where they lie: text files, folders, JSONL files and `datasets` datasets."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset

from .chunking import Document

logger = logging.getLogger(__name__)

FILE_ID = "__file_id__"  # what a text file's row has, beside its text
ROW_ID = "__row_id__"  # what a row of a file in a folder has, beside its fields
BUSY = {408, 429, 500, 502, 503, 504}  # a server's answers that pass by themselves


def source_name(source: str, subset: str | None = None) -> str:
    """What a source is called in ids and metadata: a file's or folder's own name, or a dataset's with its subset's."""
    path = Path(source)
    if path.exists():
        return path.resolve().name
    return source if subset is None else f"{source}/{subset}"


def same_name(one: str, other: str) -> ValueError:
    """What is said of two sources whose documents could replace each other's."""
    return ValueError(
        f"{one} and {other} have the same name, which their documents' ids begin with. Rename one, or give a "
        "folder that holds both."
    )


def read_rows(source: str, subset: str | None = None, split: str = "train") -> Iterable[Mapping[str, Any]]:
    """The rows of one source, in their order; a text file is one row, which carries its id.

    Args:
        source: a .jsonl file (a row a line), a .parquet file, another file (one row; the id is its name), a folder (all files
            below it but hidden ones; an id begins with the folder's name and the path in it), or a dataset of the hub, which
            is streamed.
        subset, split: of a dataset of the hub.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: a line is not JSON.
        Exception: of the network, as [`is_of_the_network`] knows it: worth another try.
    """
    path, name = Path(source), source_name(source)
    if path.is_dir():
        return _files(path, name)
    if path.suffix == ".jsonl" and path.is_file():
        return _json_lines(path)
    if path.is_file() and path.suffix != ".parquet":
        return _text_file(path, name)
    try:
        if path.is_file():
            return load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        return load_dataset(source, subset, split=split, streaming=True)
    except Exception as error:
        if is_of_the_network(error):
            raise
        raise FileNotFoundError(
            f"{source!r} is no file, no folder, and no dataset that can be loaded ({type(error).__name__}: {error})."
        ) from error


def is_of_the_network(error: BaseException) -> bool:
    """Whether the network, or a server that is busy, is at fault; not one that says that there is no such thing."""
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
    """Documents of one source, one at a time. Each carries the source's name as metadata "source".

    Args:
        source, subset, split: as for [`read_rows`].
        text_field: the field of a row with the text.
        doc_id_field: the field with the id; default: the source's name and the number of the row.
        metadata_fields: fields of a row that become the document's metadata; where one is null it has none.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset.
        ValueError: a line is not JSON, or a field is missing.
    """
    rows = read_rows(source, subset, split)
    return documents_from_rows(rows, source_name(source, subset), text_field, doc_id_field, metadata_fields)


def read_all(sources: Sequence[str], **settings: Any) -> Iterator[Document]:
    """Documents of several sources, one after the other; settings as for [`read_documents`].

    Raises:
        ValueError: two sources have the same name, so that documents of one could replace those of the other.
    """
    named: dict[str, str] = {}
    for source in sources:
        other = named.setdefault(source_name(source), source)
        if other is not source:
            raise same_name(other, source)
    for source in sources:
        yield from read_documents(source, **settings)


def documents_from_rows(
    rows: Iterable[Mapping[str, Any]],
    name: str,
    text_field: str = "text",
    doc_id_field: str | None = None,
    metadata_fields: Sequence[str] = (),
) -> Iterator[Document]:
    """Documents from mappings, such as the rows of any `datasets` dataset; `name` is part of ids that are made up."""
    return documents_from_numbered_rows(enumerate(rows), name, text_field, doc_id_field, metadata_fields)


def documents_from_numbered_rows(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    name: str,
    text_field: str = "text",
    doc_id_field: str | None = None,
    metadata_fields: Sequence[str] = (),
) -> Iterator[Document]:
    """The same for some of a source's rows, each with its number in it."""
    for number, row in rows:
        if FILE_ID in row:
            yield Document(row[FILE_ID], row["text"], {"source": name})
            continue
        own = row.get(ROW_ID, f"{name}#{number}")
        for needed in (text_field, doc_id_field, *metadata_fields):
            if needed is not None and needed not in row:
                there = ", ".join(repr(field) for field in row if field != ROW_ID)
                raise ValueError(f"{_place(own)} has no field {needed!r}; it has {there}.")
        if not isinstance(row[text_field], str):
            raise ValueError(f"{_place(own)}: field {text_field!r} is {row[text_field]!r}, not text.")
        id_ = own if doc_id_field is None else str(row[doc_id_field])
        metadata = {field: _storable(row[field]) for field in metadata_fields if row[field] is not None}
        yield Document(id_, row[text_field], {"source": name, **metadata})


def _place(row_id: str) -> str:
    """How an id that was made up reads in a message."""
    source, _, number = row_id.rpartition("#")
    return f"Row {number} of {source}"


def _storable(value: Any) -> Any:
    """Dates as `datasets` gives them become ISO text; all else is left to be checked."""
    return value.isoformat() if hasattr(value, "isoformat") else value


def _files(folder: Path, name: str) -> Iterator[Mapping[str, Any]]:
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not file.is_file() or hidden:
            continue
        id_ = f"{name}/{file.relative_to(folder).as_posix()}"
        if file.suffix in (".jsonl", ".parquet"):
            yield from ({**row, ROW_ID: f"{id_}#{number}"} for number, row in enumerate(read_rows(str(file))))
        else:
            yield from _text_file(file, id_)


def _text_file(file: Path, id_: str) -> Iterator[dict[str, str]]:
    try:
        text = file.read_bytes().decode()  # not read_text, which would turn \r\n into \n
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        logger.warning("Skipped %s: it is not UTF-8 text.", file)
    else:
        yield {FILE_ID: id_, "text": text}


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_line(line, f"{path}, line {number}")


def _json_line(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with fields, got {type(row).__name__}.")
    return row
