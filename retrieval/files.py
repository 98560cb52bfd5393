"""Read the rows of files (text, JSON, CSV, Parquet, Arrow, compressed or not) and of folders."""

import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet

logger = logging.getLogger(__name__)

Row = Mapping[Any, Any]

# Keys of ids that this module makes up. They are objects, so that no field of a file can have the
# same name.
FILE_ID = object()  # in the row of a whole text, beside "text"
ROW_ID = object()  # in a row of a file in a folder, beside its fields
DATASET_CARDS = {"dataset_info.json", "state.json", "dataset_dict.json"}  # files that `save_to_disk` writes
NAMED = 20  # skipped files that the log names one by one; further ones are counted
ROWS_AT_ONCE = 256  # rows read at once from a Parquet or Arrow file
LARGEST_CELL = 2**31 - 1  # characters in a cell of a table; the csv module's default is 128 KiB

DECOMPRESS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.CompressedInputStream(path.open("rb"), "zstd"),
}
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError)  # raised while damaged data is decompressed

# UTF-32 comes first: its mark begins like that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NOT_TEXT = "it is not UTF-8 text, nor UTF-16 or UTF-32 with a byte order mark. If it is text, convert it to UTF-8"


class Unreadable(ValueError):
    """Raised when a file cannot be read; `why` is the reason without the file's name."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"Cannot read {readable(str(path))}: {why}.")
        self.why = why


def readable(name: str) -> str:
    """Return a file's name as valid text; bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def read_file(path: Path, name: str) -> Iterator[Row]:
    """Read the rows of one file.

    The suffix tells its format; a file without a known suffix is one text.

    Args:
        path: the file.
        name: the id of a file that is one text.

    Raises:
        ValueError: the file cannot be read in its format. The message names it, and the line if
            there is one.
    """
    read = READ_AS.get(_format(path))
    return read(path) if read else iter([{FILE_ID: name, "text": read_text(path)}])


def read_folder(folder: Path, name: str, text_field: str) -> Iterator[Row]:
    """Read all files below a folder except hidden ones, in the order of their names.

    Links are followed. Files that are not text or cannot be reached are skipped with a warning. A
    CSV, TSV or JSON file without `text_field` is read as one text.

    Args:
        folder: the folder.
        name: what ids begin with.
        text_field: the field of a row that holds the text.

    Raises:
        ValueError: a file with rows is damaged.
    """
    left_out = 0

    def leave_out(path: Path, why: str) -> None:
        nonlocal left_out
        left_out += 1
        if left_out <= NAMED:
            logger.warning("Skipped %s: %s.", readable(str(path)), why)

    for file in _files_below(folder, leave_out):
        id_ = f"{name}/{readable(file.relative_to(folder).as_posix())}"
        rows = None
        if _describes_a_dataset(file):
            leave_out(file, "it describes the dataset beside it")
            continue
        if _format(file) in READ_AS:
            rows = _rows_with(text_field, file) if _format(file) in MAYBE_ROWS else read_file(file, id_)
        if rows is not None:
            yield from ({**row, ROW_ID: f"{id_}#{number}"} for number, row in enumerate(rows))
            continue
        try:
            text = read_text(file)
        except Unreadable as error:
            leave_out(file, error.why)
        else:
            yield {FILE_ID: id_, "text": text}
    if left_out > NAMED:
        logger.warning("Skipped %d more files below %s.", left_out - NAMED, readable(str(folder)))


def read_text(path: Path) -> str:
    """Read a file that is one text.

    Raises:
        Unreadable: the file is not text, or damaged.
    """
    with _open(path) as file, _naming(path):
        data = file.read()
        text = data.decode(_encoding(data))  # reading it as a text file would turn \r\n into \n
    if "\0" in text:
        raise Unreadable(path, NOT_TEXT)
    return text


def _describes_a_dataset(path: Path) -> bool:
    """Return True for a file that `save_to_disk` wrote beside a dataset's Arrow files."""
    return path.name in DATASET_CARDS and any(any(path.parent.glob(pattern)) for pattern in ("*.arrow", "*/*.arrow"))


def _rows_with(text_field: str, path: Path) -> Iterator[Row] | None:
    """Return a file's rows, or None if it has no rows with this field; the log says why."""
    try:
        rows = READ_AS[_format(path)](path)
        first = next(rows, None)
    except ValueError as error:
        logger.warning("Reading %s as one text: %s", readable(str(path)), error)
        return None
    if first is None:
        logger.warning("Skipped %s: it has no rows.", readable(str(path)))
        return iter(())
    if text_field not in first:
        logger.warning("Reading %s as one text: its rows have no field %r.", readable(str(path)), text_field)
        return None
    return chain([first], rows)


def _files_below(folder: Path, leave_out: Callable[[Path, str], None]) -> Iterator[Path]:
    """Yield each file below a folder once; `leave_out` gets each skipped path and the reason."""
    root = folder.resolve()
    walked = {root}

    def is_walked(directory: Path, real: Path) -> bool:
        """Return True if a directory's files are read under another name, or will be."""
        if real in walked:
            return True
        inside = directory.is_symlink() and real.is_relative_to(root)
        return inside and not any(part.startswith(".") for part in real.relative_to(root).parts)

    def below(directory: Path) -> Iterator[Path]:
        for path in sorted(directory.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                real = path.resolve()
                if is_walked(path, real):
                    leave_out(path, f"it leads to {readable(str(real))}, which is read already")
                else:
                    walked.add(real)
                    yield from below(path)
            elif path.is_file():
                yield path
            else:
                leave_out(path, "it is a broken link" if path.is_symlink() else "it is not a regular file")

    return below(folder)


def _format(path: Path) -> str:
    """Return the suffix of a file's format, in lower case and without a compression's suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in DECOMPRESS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> BinaryIO:
    """Open a file for reading its bytes, decompressed."""
    with _naming(path):
        decompress = DECOMPRESS.get(path.suffix.lower())
        return path.open("rb") if decompress is None else decompress(path)


def _encoding(beginning: bytes) -> str:
    """Return the encoding that a byte order mark names, or UTF-8."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if beginning.startswith(mark):
            return encoding
    return "utf-8-sig"  # UTF-8 with or without a mark


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open a file for reading its text; line ends stay as they are."""
    with _open(path) as file, _naming(path):
        encoding = _encoding(file.read(4))
    with _open(path) as file, io.TextIOWrapper(file, encoding=encoding, newline="") as text:
        yield text


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors about its content."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise Unreadable(path, NOT_TEXT) from error
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the file system, which names the file
        raise Unreadable(path, f"it is damaged, or not compressed as its name says ({error})") from error


def _json_lines(path: Path) -> Iterator[Row]:
    """Read an object from each line that is not blank."""
    with _open_text(path) as lines, _naming(path):
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{readable(str(path))}, line {number}"
                yield _object(_json(line, where), where)


def _json_file(path: Path) -> Iterator[Row]:
    """Read a list of objects, one object per line, or a single object."""
    with _open_text(path) as lines, _naming(path):
        first = next((line for line in lines if line.strip()), "")
    where = readable(str(path))
    try:
        is_line = isinstance(_json(first, where), dict)
    except ValueError:
        is_line = False
    if is_line:
        yield from _json_lines(path)
        return
    content = _json(read_text(path), where)
    for number, item in enumerate(content if isinstance(content, list) else [content]):
        yield _object(item, f"{where}, item {number}")


def _json(text: str, where: str) -> Any:
    """Parse JSON; an error names the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error


def _object(value: Any, where: str) -> Row:
    """Return a parsed JSON value if it is an object; raise ValueError otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with fields, got {type(value).__name__}.")
    return value


def _table(**dialect: Any) -> Callable[[Path], Iterator[Row]]:
    """Return a function that reads the rows of a table in a dialect of the csv module."""

    def read(path: Path) -> Iterator[Row]:
        csv.field_size_limit(LARGEST_CELL)
        where = readable(str(path))
        advice = (
            "A .tsv file has no quotes: write it as .csv if there are tabs or line breaks in its cells."
            if dialect
            else "Put cells that contain a comma, a line break or a quote into double quotes, and double each quote."
        )
        with _open_text(path) as text, _naming(path):
            lines = csv.reader(text, strict=True, **dialect)
            try:
                header = next(lines, [])
                if len(set(header)) < len(header):
                    raise ValueError(f"{where}: two columns have the same name; its columns are {header}.")
                for cells in lines:
                    if len(cells) != len(header) and cells:
                        raise ValueError(
                            f"{where}, line {lines.line_num}: {len(cells)} cells, but {len(header)} columns. {advice}"
                        )
                    if cells:
                        yield dict(zip(header, cells, strict=True))
            except csv.Error as error:
                raise ValueError(f"{where}, line {lines.line_num}: {error}. {advice}") from error

    return read


def _parquet(path: Path) -> Iterator[Row]:
    """Read the rows of a Parquet file."""
    with _columnar(path) as file:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _arrow(path: Path) -> Iterator[Row]:
    """Read the rows of an Arrow file (Feather) or an Arrow stream."""
    with _columnar(path) as file:
        try:
            table = pa.ipc.open_file(file)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            batches = pa.ipc.open_stream(file)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield from batch.slice(start, ROWS_AT_ONCE).to_pylist()


@contextmanager
def _columnar(path: Path) -> Iterator[BinaryIO]:
    """Open a Parquet or Arrow file; errors about its content name it."""
    if path.suffix.lower() in DECOMPRESS:
        raise Unreadable(path, "Parquet and Arrow files are compressed inside. Decompress it first")
    with path.open("rb") as file:
        try:
            yield file
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise Unreadable(path, f"it is damaged, or not in the format that its name says ({error})") from error


READ_AS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _table(),
    ".tsv": _table(delimiter="\t", quoting=csv.QUOTE_NONE),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}
MAYBE_ROWS = {".json", ".csv", ".tsv"}  # in a folder, read as one text if they have no text field
