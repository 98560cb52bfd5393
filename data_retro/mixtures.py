"""Streams of documents: several datasets, filtered, shuffled and mixed by weight, as `datasets` does it."""

import importlib
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
from retrieval.filters import row_predicate
from retrieval.sources import documents_from_numbered_rows, is_of_the_network, read_rows, same_name, source_name

from .packing import pack_documents, packed_dataset

logger = logging.getLogger(__name__)

FEATURES = Features({"id": Value("string"), "text": Value("string")})
_END = object()


@dataclass(frozen=True)
class DocumentStream:
    """One source of a mixture; the fields are the keys of an entry of `train_data` in YAML.

    Attributes:
        dataset: as for [`retrieval.sources.read_rows`].
        subset, split: of a dataset of the hub.
        text_field, doc_id_field: fields of a row; without the latter, a document's id is the source's name and the row's number.
        weight: share of this source among the documents of the mixture, relative to the others'; all sources have one or none.
        filter: "module:function" that takes a row and says whether it is kept, or a condition on columns such as
            {"language": "en", "score": {">=": 0.5}, "kind": ["web", "wiki"]}; a row without the column is left out.
        shuffle_buffer: documents among which the next one is drawn; 0 keeps the order.
        seed: of the shuffle, which is another one in each epoch.
        num_shards, shard_index: only every `num_shards`-th row is read, from row `shard_index` on.
        skip, take: rows (of the shard, that pass the filter) left out at the beginning, and read at most after that.

    Raises:
        ValueError: a field out of its range, or a filter that is neither.
    """

    dataset: str
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    doc_id_field: str | None = None
    weight: float | None = None
    filter: str | Mapping[str, Any] | None = None
    shuffle_buffer: int = 0
    seed: int = 0
    num_shards: int = 1
    shard_index: int = 0
    skip: int = 0
    take: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, str) or not self.dataset:
            raise ValueError(f"A data source needs the name of its dataset, file or folder; it is {self.dataset!r}.")
        where = f"Data source {self.dataset!r}: "
        if self.weight is not None and not (isinstance(self.weight, int | float) and 0 <= self.weight < float("inf")):
            raise ValueError(f"{where}weight is {self.weight!r}; it must be a number from 0.")
        for name, least in (("shuffle_buffer", 0), ("num_shards", 1), ("shard_index", 0), ("skip", 0), ("take", 1)):
            value = getattr(self, name)
            if (name, value) != ("take", None) and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{where}{name} is {value!r}; it must be a whole number from {least}.")
        if self.shard_index >= self.num_shards:
            raise ValueError(f"{where}shard_index is {self.shard_index}, but there are {self.num_shards} shards.")
        row_filter(self.filter, where)

    def has_files_for(self, processes: int) -> bool:
        """Return True if each of `processes` can read files of its own, and all get like documents.

        It is False where rows must be counted, for ids or by the settings, and with a filter, which may suit some files alone.
        """
        if self.doc_id_field is None or self.filter or (self.num_shards, self.skip, self.take) != (1, 0, None):
            return False
        rows = network_retries()(read_rows, self.dataset, self.subset, self.split)
        return isinstance(rows, IterableDataset) and rows.num_shards % processes == 0

    def documents(self, rank: int = 0, processes: int = 1) -> Iterator[dict[str, str]]:
        """Rows {"id", "text"}, one pass, neither shuffled nor mixed; with several `processes`, those of this one's files.

        Raises:
            FileNotFoundError: there is no such file, folder or dataset.
            ValueError: a row has no text field; the message names those that it has.
        """

        def read() -> Iterable[Mapping[str, Any]]:
            rows = read_rows(self.dataset, self.subset, self.split, self.text_field)
            return rows if processes == 1 else split_dataset_by_node(rows, rank, processes)

        rows = islice(enumerate(patiently(read)), self.shard_index, None, self.num_shards)
        if self.filter is not None:
            keeps = row_filter(self.filter, f"Data source {self.dataset!r}: ")
            rows = (numbered for numbered in rows if keeps(numbered[1]))
        rows = islice(rows, self.skip, None if self.take is None else self.skip + self.take)
        name = source_name(self.dataset, self.subset)
        for document in documents_from_numbered_rows(rows, name, self.text_field, self.doc_id_field):
            yield {"id": document.id, "text": document.text}


def sample(streams: Sequence[DocumentStream], count: int) -> dict[str, list[dict[str, str]]]:
    """The first `count` documents of each source that has a weight, by its dataset's name: what is wrong with one shows.

    Raises:
        FileNotFoundError, ValueError: as [`DocumentStream.documents`]; or a source gives no document.
    """
    samples: dict[str, list[dict[str, str]]] = {}
    for stream in streams:
        if stream.weight != 0:
            documents = list(islice(stream.documents(), count))
            if not documents:
                passing = "" if stream.filter is None else f" that passes its filter {stream.filter!r}"
                raise ValueError(f"Data source {stream.dataset!r} gives no document{passing}.")
            samples.setdefault(stream.dataset, []).extend(documents)
    return samples


def row_filter(condition: str | Mapping[str, Any] | None, where: str = "") -> Callable[[Mapping[str, Any]], bool]:
    """Return `DocumentStream.filter` as a function of a row.

    Args:
        condition: "module:function", a filter as in [`retrieval.filters`], or None to keep all.
        where: the beginning of each error message.

    Raises:
        ValueError: no such module or function, or a wrong filter. The returned function raises it,
            too, for a value that cannot be compared.
    """
    if condition is None:
        return lambda row: True
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

    def keeps(row: Mapping[str, Any]) -> bool:
        try:
            return matches(row)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error

    return keeps


def _imported_filter(name: str, where: str) -> Callable[[Mapping[str, Any]], bool]:
    """Import the filter "module:function"."""
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
    return function


def network_retries(attempts: int = 6) -> tenacity.Retrying:
    """Calls a function again, after growing pauses, while the network fails; raises its last error."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_of_the_network),
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=1, max=60),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )


def patiently(rows: Callable[[], Iterable[Mapping[str, Any]]], attempts: int = 6) -> Iterator[Mapping[str, Any]]:
    """The rows that `rows()` gives, going on at the same row when the network fails, with growing pauses.

    A `datasets` stream goes on from its `state_dict`; anything else is read again up to the row it had come to.

    Raises:
        ConnectionError, TimeoutError: it went on failing, `attempts` times without a row in between.
    """
    retrying = network_retries(attempts)
    source, rows_read, state = None, 0, None

    def step(iterator: Iterator | None) -> tuple[Iterator, Any]:
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
            logger.warning("Reading broke off after %d rows (%s): going on from there.", rows_read, error)
        # the old iterator ended with its error; outside of the handler, or the next error would look like the network's, too
        iterator, row = retrying(step, None)


def mix(streams: Sequence[DocumentStream], epoch: int = 0, rank: int = 0, processes: int = 1) -> Iterator[Document]:
    """The documents of all streams: one after the other, or drawn by their weights until each is used up.

    With weights, a stream that ends before the others begins again, as `interleave_datasets` has it ("all_exhausted").
    Several processes share the documents: if all sources have files for each (see [`DocumentStream.has_files_for`]), each reads
    its own, or else all read all, and each gets every `processes`-th document of the same order.

    Args:
        epoch: gives every shuffle, and the order of the draws, another seed.

    Raises:
        ValueError: the weights sum to nothing, or some streams have one and others not.
    """
    check_mixture(streams)
    streams = [stream for stream in streams if stream.weight != 0]
    by_files = processes > 1 and all(stream.has_files_for(processes) for stream in streams)
    own = {"rank": rank, "processes": processes} if by_files else {}
    parts, weights = [], []
    for stream in streams:
        part = IterableDataset.from_generator(stream.documents, gen_kwargs=own, features=FEATURES)
        if stream.shuffle_buffer:
            part = part.shuffle(seed=_seed(stream.seed, epoch), buffer_size=stream.shuffle_buffer)
        parts.append(part)
        weights.append(stream.weight)
    if None in weights:
        rows: Iterable[dict] = chain.from_iterable(parts)
    else:
        shares = (np.array(weights) / sum(weights)).tolist()
        rows = interleave_datasets(
            parts, probabilities=shares, seed=_seed(streams[0].seed, epoch), stopping_strategy="all_exhausted"
        )
    if not by_files:
        rows = islice(rows, rank, None, processes)
    return (Document(row["id"], row["text"]) for row in rows)


def _seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def check_mixture(streams: Sequence[DocumentStream]) -> None:
    """Raises ValueError if the weights sum to nothing, or some streams have one and others not; or two have one name."""
    weights = [stream.weight for stream in streams]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        without = [stream.dataset for stream in streams if stream.weight is None]
        raise ValueError(f"Some data sources have a weight and {without} have none: give all of them one, or none.")
    if weights and None not in weights and not sum(weights) > 0:
        raise ValueError(
            f"The weights of the data sources are {weights}: they sum to nothing. Give one of them a weight."
        )
    named: dict[tuple, str] = {}
    for stream in streams:
        key = (source_name(stream.dataset, stream.subset), stream.split)
        other = named.setdefault(key, stream.dataset)
        if other != stream.dataset and stream.doc_id_field is None:
            raise same_name(other, stream.dataset)


def pack_streams(
    streams: list[DocumentStream], tokenizer: BulkTokenizer, block_size: int, chunk_size: int, cache_dir: str | Path
) -> Dataset:
    """One pass over the mixture as sequences of block_size tokens, in its order, in an Arrow file."""

    def sequences() -> Iterator[dict]:
        return (sequence for sequence, _ in pack_documents(mix(streams), tokenizer, block_size, chunk_size))

    return packed_dataset(sequences, cache_dir)
