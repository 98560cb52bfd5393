"""Packing: documents → sequences of one length, which know where each of their documents ends."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from uuid import uuid4

import torch
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from retrieval.chunking import Document, tokenize_documents
from retrieval.tokenization import BulkTokenizer

from .first_points import FirstPoints

NO_TEXT = "There is no text to pack: no document has a text. A stream needs at least one document for each process."
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "doc_ids": List(List(Value("string"))),
        "doc_ends": List(List(Value("int32"))),
    }
)
FIRST_POINT = {"first_point": Value("int32")}  # a further column of sequences with a first point of their own
Place = tuple[int, int]  # documents that are used up, and used tokens of the next one


def pack(
    documents: Iterable[tuple[str, Sequence[int]]],
    block_size: int,
    chunk_size: int,
    end_of_text_id: int,
    begin_of_text_id: int | None = None,
) -> Iterator[dict]:
    """Join tokenized documents and cut the stream into sequences of `block_size` tokens.

    End-of-text follows each document.

    Chunk j of a sequence is its tokens [j * chunk_size, (j + 1) * chunk_size), whatever documents
    they come from. If `block_size` is not a multiple of `chunk_size`, the last chunk is shorter.

    The last sequence is kept although it is shorter. So a text smaller than one block still trains,
    and an evaluation measures every token. Only a single last token is dropped: nothing predicts
    it.

    Args:
        documents: pairs (document id, token ids). A document without tokens is skipped.
        block_size: tokens in a sequence.
        chunk_size: tokens in a chunk.
        end_of_text_id: the token after each document; it belongs to the document before it.
        begin_of_text_id: the first token of each sequence, for decoders that expect one. Default:
            none.

    Yields:
        {"input_ids": up to block_size ints, "doc_ids": a list of document ids for each chunk,
        including a partial last one, "doc_ends": for each of these ids the number of tokens in the
        sequence up to the document's last one in that chunk}.
    """
    packed = pack_from(documents, block_size, chunk_size, end_of_text_id, begin_of_text_id)
    return (sequence for sequence, _ in packed)


def pack_from(
    documents: Iterable[tuple[str, Sequence[int]]],
    block_size: int,
    chunk_size: int,
    end_of_text_id: int,
    begin_of_text_id: int | None = None,
    start: int = 0,
) -> Iterator[tuple[dict, Place]]:
    """Pack as [`pack`] does, from token `start` of the first document on.

    Yields:
        a sequence, and the place in the documents where it ends.
    """
    first = [] if begin_of_text_id is None else [begin_of_text_id]
    tokens = list(first)
    ends: list[dict[str, int]] = []  # for each chunk, where its documents end in it
    number = -1
    for number, (doc_id, document) in enumerate(documents):
        rest = [*document, end_of_text_id] if len(document) else []
        used, start = start, 0
        while used < len(rest):
            piece = rest[used : used + block_size - len(tokens)]
            first_chunk = len(tokens) // chunk_size
            tokens += piece
            used += len(piece)
            ends.extend({} for _ in range(-(-len(tokens) // chunk_size) - len(ends)))
            for chunk in range(first_chunk, len(ends)):
                ends[chunk][doc_id] = min((chunk + 1) * chunk_size, len(tokens))
            if len(tokens) == block_size:
                yield _sequence(tokens, ends), (number, used)
                tokens, ends = list(first), []
    if len(tokens) > 1:
        yield _sequence(tokens, ends), (number + 1, 0)


def _sequence(tokens: list[int], ends: list[dict[str, int]]) -> dict:
    return {
        "input_ids": tokens,
        "doc_ids": [list(documents) for documents in ends],
        "doc_ends": [list(documents.values()) for documents in ends],
    }


def pack_documents(
    documents: Iterable[Document], tokenizer: BulkTokenizer, block_size: int, chunk_size: int, start: int = 0
) -> Iterator[tuple[dict, Place]]:
    """Tokenize documents and pack them as [`pack_from`] does.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text token (eos_token), which separates documents. Set one.")
    tokenized = ((document.id, ids) for document, ids in tokenize_documents(documents, tokenizer))
    return pack_from(tokenized, block_size, chunk_size, tokenizer.eos_token_id, tokenizer.bos_token_id, start)


class PackedStream(torch.utils.data.IterableDataset):
    """Packs a stream of documents, epoch after epoch without end; it can continue where it stopped.

    Args:
        documents: maps an epoch's number to its documents. The same epoch must give the same
            documents in the same order.
        tokenizer: computes the tokens.
        block_size, chunk_size: as for [`pack`].
        first_points: gives each sequence a column `first_point`. None: the paper's grid.

    Raises (while it is read):
        ValueError: an epoch has no sequence.
    """

    def __init__(
        self,
        documents: Callable[[int], Iterable[Document]],
        tokenizer: BulkTokenizer,
        block_size: int,
        chunk_size: int,
        first_points: FirstPoints | None = None,
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.block_size, self.chunk_size, self.first_points = block_size, chunk_size, first_points
        self._start = (0, 0, 0)  # epoch, documents used up in it, tokens used of the next document
        # (sequences so far, place after them): a queue, since one thread reads ahead and another
        # one asks
        self._places: deque[tuple[int, tuple[int, int, int]]] = deque()

    def __iter__(self) -> Iterator[dict]:
        return self._packed() if self.first_points is None else self.first_points.add_to(self._packed())

    def _packed(self) -> Iterator[dict]:
        count = 0
        epoch, skipped, start = self._start
        self._places = deque([(0, self._start)])
        while True:
            documents = islice(self.documents(epoch), skipped, None)
            empty = not skipped and not start
            packed = pack_documents(documents, self.tokenizer, self.block_size, self.chunk_size, start)
            for sequence, (used, tokens) in packed:
                empty = False
                count += 1
                self._places.append((count, (epoch, skipped + used, tokens)))
                yield sequence
            if empty:
                raise ValueError(NO_TEXT)
            epoch, skipped, start = epoch + 1, 0, 0

    def state_after(self, count: int) -> list[int]:
        """Return the state after the first `count` sequences, from which [`load_state`] continues.

        Sequences that were read ahead do not matter. Earlier places are forgotten: `count` may only
        grow.
        """
        while self._places[0][0] < count:
            self._places.popleft()
        return list(self._places[0][1])

    def load_state(self, state: Sequence[int]) -> None:
        """Continue from a state; its epoch's earlier documents are read again, not tokenized."""
        epoch, documents, tokens = state
        self._start = (epoch, documents, tokens)


def packed_dataset(sequences: Callable[[], Iterator[dict]], cache_dir: str | Path) -> Dataset:
    """Write packed sequences to an Arrow file, in bounded memory, and open it as a `Dataset`.

    Args:
        sequences: returns a new iterator over sequences as [`pack`] yields them, all with a column
            `first_point` or none.
        cache_dir: the folder of the file, which must exist as long as the dataset is used.

    Raises:
        ValueError: there is no sequence.
    """
    first = next(sequences(), None)
    if first is None:
        raise ValueError(NO_TEXT)
    features = Features(FEATURES | FIRST_POINT) if "first_point" in first else FEATURES
    # A new fingerprint: otherwise `datasets` reuses an old file although its text has changed.
    try:
        return Dataset.from_generator(
            sequences, features=features, cache_dir=str(cache_dir), fingerprint=uuid4().hex, keep_in_memory=False
        )
    except DatasetGenerationError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None  # names the problem and its place
