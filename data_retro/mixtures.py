"""Streams of documents: datasets that are filtered, shuffled and mixed by weight."""

import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tenacity
from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets
from datasets.distributed import split_dataset_by_node

from retrieval import BulkTokenizer
from retrieval.chunking import Document
from retrieval.files import Row
from retrieval.filters import row_predicate
from retrieval.sources import Source, documents_from_numbered_rows, is_of_the_network, same_name

from .first_points import FirstPoints
from .packing import pack_documents, packed_dataset

logger = logging.getLogger(__name__)

FEATURES = Features({"id": Value("string"), "text": Value("string")})
LONGEST_PAUSE = 60  # seconds between two attempts of a network call
ROW_NUMBER = "row_number"  # in a filter, the name of a row's number
# the least value of each count of a stream
LEAST = {"shuffle_buffer": 0, "num_shards": 1, "shard_index": 0, "skip": 0, "take": 1, "initially_skip": 0}
_END = object()

RowFilter = Callable[[Mapping[str, Any], int], bool]  # takes a row and its number


@dataclass(frozen=True)
class DocumentStream(Source):
    """One source of a mixture; its fields are the keys of an entry of `train_data`.

    The fields of [`Source`] say what is read, the others how it is mixed.

    Attributes:
        weight: this source's share of the mixture's documents, relative to the other weights. All
            sources have a weight, or none has.
        filter: "module:function", a function that takes a row, or a row and its number, and returns
            True to keep it; or a condition on columns such as {"language": "en", "score": {">=":
            0.5}, "kind": ["web", "wiki"]}. A row without the column is left out. The column
            `row_number` is the row's number, unless the rows have such a column of their own. Rows
            are numbered from 0 in the whole source, before the shard.
        shuffle_buffer: documents among which the next one is drawn; 0 keeps the order.
        seed: seed of the shuffle. Each epoch has another order.
        num_shards, shard_index: read only every `num_shards`-th row, from row `shard_index` on.
        skip, take: after the shard and the filter, rows to leave out first, and rows to read at
            most.
        initially_skip: of the rows that are left, those to leave out at first, where an earlier run
            stopped reading. The next epoch, or the next pass over a source that begins again, reads
            them.

    Raises:
        ValueError: a field is out of its range; `filter` is neither form; or `metadata_fields` is
            given, which only a knowledge base uses.
    """

    weight: float | None = None
    filter: str | Mapping[str, Any] | None = None
    shuffle_buffer: int = 0
    seed: int = 0
    num_shards: int = 1
    shard_index: int = 0
    skip: int = 0
    take: int | None = None
    initially_skip: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metadata_fields:
            raise ValueError(
                f"{self.where}metadata_fields is for a knowledge base. Training reads text alone: omit it."
            )
        if self.weight is not None and not (isinstance(self.weight, int | float) and 0 <= self.weight < float("inf")):
            raise ValueError(f"{self.where}weight is {self.weight!r}; it must be a number from 0.")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if (name, value) != ("take", None) and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{self.where}{name} is {value!r}; it must be a whole number from {least}.")
        if self.shard_index >= self.num_shards:
            raise ValueError(f"{self.where}shard_index is {self.shard_index}, but there are {self.num_shards} shards.")
        row_filter(self.filter, self.where)

    def has_files_for(self, processes: int) -> bool:
        """Return True if the source has files that `processes` can share evenly.

        It returns False if rows must be numbered (for ids, shards, skips or take). It also returns
        False with a filter, which may drop all rows of some files.
        """
        numbered = self.num_shards > 1 or self.skip or self.take is not None or self.initially_skip
        if self.doc_id_field is None or self.filter or numbered:
            return False
        rows = network_retries()(self.rows)
        return isinstance(rows, IterableDataset) and rows.num_shards % processes == 0

    def documents(self, rank: int = 0, processes: int = 1, skipped: int = 0) -> Iterator[dict[str, str]]:
        """Yield {"id", "text"} for each document, in one pass without shuffle.

        Args:
            rank, processes: with several processes, read only the files of this one.
            skipped: documents to leave out at the start of this pass, such as `initially_skip`.

        Raises:
            FileNotFoundError: there is no such file, folder or dataset.
            ValueError: a row has no text field, and the message names those that it has; or there
                are fewer documents than `skipped`.
        """

        def read() -> Iterable[Row]:
            rows = self.rows()
            return rows if processes == 1 else split_dataset_by_node(rows, rank, processes)

        rows: Iterator[tuple[int, Row]] = enumerate(patiently(read))
        rows = islice(rows, self.shard_index, None, self.num_shards)
        if self.filter is not None:
            keeps = row_filter(self.filter, self.where)
            rows = ((number, row) for number, row in rows if keeps(row, number))
        rows = islice(rows, self.skip, None if self.take is None else self.skip + self.take)
        there = sum(1 for _ in islice(rows, skipped))
        if there < skipped:
            raise ValueError(f"{self.where}initially_skip is {skipped}, but only {there} rows are left. Lower it.")
        for document in documents_from_numbered_rows(rows, self):
            yield {"id": document.id, "text": document.text}


def sample(streams: Sequence[DocumentStream], count: int) -> dict[str, list[dict[str, str]]]:
    """Read the first `count` documents of each source, so that errors in a source show early.

    Sources of weight 0 are left out.

    Returns:
        documents {"id", "text"} by the name of the dataset.

    Raises:
        FileNotFoundError, ValueError: as for [`DocumentStream.documents`]; or a source gives no
            document.
    """
    samples: dict[str, list[dict[str, str]]] = {}
    for stream in streams:
        if stream.weight != 0:
            documents = list(islice(stream.documents(), count))
            if not documents:
                passing = "" if stream.filter is None else f" that passes its filter {stream.filter!r}"
                raise ValueError(f"{stream.where}it gives no document{passing}.")
            samples.setdefault(stream.dataset, []).extend(documents)
    return samples


def row_filter(condition: str | Mapping[str, Any] | None, where: str = "") -> RowFilter:
    """Return `DocumentStream.filter` as a function of a row and its number.

    Args:
        condition: "module:function", a filter as in [`retrieval.filters`], or None to keep all.
        where: the beginning of each error message.

    Raises:
        ValueError: no such module or function, or a wrong filter. The returned function raises it,
            too, for a value that cannot be compared.
    """
    if condition is None:
        return lambda row, number: True
    if isinstance(condition, str):
        return _imported_filter(condition, where)
    if not isinstance(condition, Mapping):
        raise ValueError(
            f"{where}filter must be 'module:function' or a mapping of columns to values, not {condition!r}."
        )
    try:
        matches = row_predicate(condition)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error

    def keeps(row: Mapping[str, Any], number: int) -> bool:
        if ROW_NUMBER in condition:
            row = {ROW_NUMBER: number, **row}
        try:
            return matches(row)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error

    return keeps


def _imported_filter(name: str, where: str) -> RowFilter:
    """Import the filter "module:function", which takes a row, or a row and its number."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where}Cannot import the filter {name!r} ({error}). Name a function like 'package.module:function'."
        ) from error
    if not callable(function):
        raise ValueError(
            f"{where}The filter {name!r} is no function, but {function!r}. Name one like 'package.module:function'."
        )
    takes = [count for count in (1, 2) if _takes(function, count)]
    if not takes:
        raise ValueError(
            f"{where}The filter {name!r} cannot be called with a row, nor with a row and its number. Name a function "
            "that takes one of these."
        )
    return function if takes == [2] else lambda row, number: function(row)


def _takes(function: Callable, count: int) -> bool:
    """Return True if a function can be called with `count` arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except ValueError:  # a function in C may have no signature; it gets the row alone
        return count == 1
    except TypeError:
        return False
    return True


def network_retries(attempts: int = 6) -> tenacity.Retrying:
    """Return a retry policy for network errors: growing pauses, then the last error is raised."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_of_the_network),
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=1, max=LONGEST_PAUSE),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )


def patiently(rows: Callable[[], Iterable[Row]], attempts: int = 6) -> Iterator[Row]:
    """Yield the rows of `rows()`; when the network fails, pause and continue at the same row.

    A `datasets` stream continues from its `state_dict`. Anything else is read again up to the row
    where it stopped.

    Raises:
        ConnectionError, TimeoutError: the network failed `attempts` times without a row in between.
    """
    retrying = network_retries(attempts)
    source: Any = None
    rows_read, state = 0, None

    def step(iterator: Iterator[Row] | None) -> tuple[Iterator[Row], Any]:
        nonlocal source
        if iterator is None:
            source = rows()
            if state is not None:
                source.load_state_dict(state)
            iterator = islice(iter(source), 0 if state is not None else rows_read, None)
        return iterator, next(iterator, _END)

    iterator, row = retrying(step, None)
    while row is not _END:
        rows_read += 1
        if hasattr(source, "state_dict"):
            state = source.state_dict()
        yield row
        try:
            iterator, row = step(iterator)
            continue
        except Exception as error:
            if not is_of_the_network(error):
                raise
            logger.warning("Reading broke off after %d rows (%s). It continues there.", rows_read, error)
        # The failed iterator is useless, so open a new one. Do this outside the `except` block:
        # there, the network error would become the context of any later error, and
        # `is_of_the_network` would take that one for a network error too.
        iterator, row = retrying(step, None)


def mix(streams: Sequence[DocumentStream], epoch: int = 0, rank: int = 0, processes: int = 1) -> Iterator[Document]:
    """Yield the documents of all streams, in turn or drawn by weight.

    Without weights, the streams follow one another.

    With weights, documents are drawn until each stream is used up, and a stream that ends before
    the others begins again (`interleave_datasets` calls it "all_exhausted"). Several processes
    share the documents. If all sources have files for each process (see
    [`DocumentStream.has_files_for`]), each reads its own files. Otherwise all read everything, and
    each takes every `processes`-th document of the same order.

    Args:
        streams: the sources.
        epoch: changes the seed of every shuffle and of the draws. Epoch 0 obeys `initially_skip`.
        rank, processes: this process' number, and how many processes there are.

    Raises:
        ValueError: the weights sum to zero, or some streams have a weight and others do not.
    """
    check_mixture(streams)
    streams = [stream for stream in streams if stream.weight != 0]
    by_files = processes > 1 and all(stream.has_files_for(processes) for stream in streams)
    own = {"rank": rank, "processes": processes} if by_files else {}
    parts = []
    for stream in streams:
        passes = _Passes(stream, stream.initially_skip if epoch == 0 else 0)
        part = IterableDataset.from_generator(passes.documents, gen_kwargs=own, features=FEATURES)
        if stream.shuffle_buffer:
            part = part.shuffle(seed=_seed(stream.seed, epoch), buffer_size=stream.shuffle_buffer)
        parts.append(part)
    weights = [stream.weight for stream in streams if stream.weight is not None]
    rows: Iterable[dict] = chain.from_iterable(parts)
    if weights:
        shares = (np.array(weights) / sum(weights)).tolist()
        rows = interleave_datasets(
            parts, probabilities=shares, seed=_seed(streams[0].seed, epoch), stopping_strategy="all_exhausted"
        )
    if not by_files:
        rows = islice(rows, rank, None, processes)
    return (Document(row["id"], row["text"]) for row in rows)


class _Passes:
    """The passes over a stream in one epoch; the first one leaves some documents out."""

    def __init__(self, stream: DocumentStream, skipped: int) -> None:
        self.stream, self.skipped = stream, skipped

    def documents(self, **own: int) -> Iterator[dict[str, str]]:
        """Yield the documents of the next pass."""
        skipped, self.skipped = self.skipped, 0
        yield from self.stream.documents(**own, skipped=skipped)


def _seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def check_mixture(streams: Sequence[DocumentStream]) -> None:
    """Raise ValueError if only some streams have a weight, weights sum to zero, or names repeat."""
    without = [stream.dataset for stream in streams if stream.weight is None]
    weights = [stream.weight for stream in streams if stream.weight is not None]
    if weights and without:
        raise ValueError(f"Some data sources have a weight and {without} have none. Give all of them one, or none.")
    if weights and not sum(weights) > 0:
        raise ValueError(f"The weights of the data sources are {weights}: they sum to zero. Raise one of them.")
    named: dict[tuple, str] = {}
    for stream in streams:
        other = named.setdefault((stream.name, stream.split), stream.dataset)
        if other != stream.dataset and stream.doc_id_field is None:
            raise same_name(other, stream.dataset)


def pack_streams(
    streams: list[DocumentStream],
    tokenizer: BulkTokenizer,
    block_size: int,
    chunk_size: int,
    cache_dir: str | Path,
    first_points: FirstPoints | None = None,
) -> Dataset:
    """Pack one pass over the mixture into an Arrow file in `cache_dir`; see [`pack`] for sizes.

    With `first_points`, each sequence gets a column `first_point`.
    """

    def sequences() -> Iterator[dict]:
        packed = (sequence for sequence, _ in pack_documents(mix(streams), tokenizer, block_size, chunk_size))
        return packed if first_points is None else first_points.add_to(packed)

    return packed_dataset(sequences, cache_dir)
