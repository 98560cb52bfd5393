"""Packing: documents → sequences of one length, each chunk with the ids of the documents it touches."""

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

NO_TEXT = "There is no text to pack: every document is empty, or there are none (a stream needs one for each process)."
FEATURES = Features({"input_ids": List(Value("int32")), "doc_ids": List(List(Value("string")))})
Place = tuple[int, int]  # documents that are used up, and tokens of the next one


def pack(
    documents: Iterable[tuple[str, Sequence[int]]], block_size: int, chunk_size: int, end_of_text_id: int
) -> Iterator[dict]:
    """Join tokenized documents, each closed by end-of-text, and cut the stream every `block_size` tokens.

    The chunk grid is that of the sequence: chunk j is tokens [j * chunk_size, (j + 1) * chunk_size), whatever documents
    they come from. `block_size` need not be a multiple of `chunk_size`; the last chunk is then shorter.

    The last sequence is kept although it is shorter: a text smaller than one block still trains, and an evaluation
    measures every token it was given. Only a lone last token is dropped, since nothing predicts it.

    Args:
        documents: pairs (document id, token ids); a document without tokens leaves nothing behind.
        block_size: tokens in a sequence.
        chunk_size: tokens in a chunk.
        end_of_text_id: the token after each document; it counts as touched by the document that it closes.

    Yields:
        {"input_ids": up to block_size ints, "doc_ids": for each chunk, the partial last one too, a list of ids}.
    """
    return (sequence for sequence, _ in pack_from(documents, block_size, chunk_size, end_of_text_id))


def pack_from(
    documents: Iterable[tuple[str, Sequence[int]]],
    block_size: int,
    chunk_size: int,
    end_of_text_id: int,
    start: int = 0,
) -> Iterator[tuple[dict, Place]]:
    """The same from token `start` of the first document on, with the place in the documents where each sequence ends."""
    tokens: list[int] = []
    touched: list[list[str]] = []
    number = -1
    for number, (doc_id, document) in enumerate(documents):
        rest = [*document, end_of_text_id] if len(document) else []
        used, start = start, 0
        while used < len(rest):
            piece = rest[used : used + block_size - len(tokens)]
            first_chunk, last_chunk = len(tokens) // chunk_size, (len(tokens) + len(piece) - 1) // chunk_size
            touched.extend([] for _ in range(last_chunk + 1 - len(touched)))
            for ids in touched[first_chunk:]:
                if doc_id not in ids:
                    ids.append(doc_id)
            tokens += piece
            used += len(piece)
            if len(tokens) == block_size:
                yield {"input_ids": tokens, "doc_ids": touched}, (number, used)
                tokens, touched = [], []
    if len(tokens) > 1:
        yield {"input_ids": tokens, "doc_ids": touched}, (number + 1, 0)


def pack_documents(
    documents: Iterable[Document], tokenizer: BulkTokenizer, block_size: int, chunk_size: int, start: int = 0
) -> Iterator[tuple[dict, Place]]:
    """The same for texts."""
    tokenized = ((document.id, ids) for document, ids in tokenize_documents(documents, tokenizer))
    return pack_from(tokenized, block_size, chunk_size, tokenizer.eos_token_id, start)


class PackedStream(torch.utils.data.IterableDataset):
    """Packed sequences of a stream of documents, epoch after epoch without end, which can go on where it stopped.

    Args:
        documents: epoch → its documents; the same epoch gives the same ones in the same order.
        tokenizer: gives the tokens.
        block_size, chunk_size: as for [`pack`].

    Raises (while it is read):
        ValueError: an epoch without a sequence.
    """

    def __init__(
        self, documents: Callable[[int], Iterable[Document]], tokenizer: BulkTokenizer, block_size: int, chunk_size: int
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.block_size, self.chunk_size = block_size, chunk_size
        self._start = (0, 0, 0)  # epoch, documents, tokens
        # after so many sequences; a queue, as one thread reads ahead and another one asks
        self._places: deque[tuple[int, tuple[int, int, int]]] = deque()

    def __iter__(self) -> Iterator[dict]:
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
        """Where to go on when the first `count` sequences were used, whatever was read ahead; [`load_state`] takes it.

        A run goes only forward: earlier places are forgotten.
        """
        while self._places[0][0] < count:
            self._places.popleft()
        return list(self._places[0][1])

    def load_state(self, state: Sequence[int]) -> None:
        """Go on from there, by reading the documents before it once more without tokenizing them."""
        self._start = tuple(state)


def packed_dataset(sequences: Callable[[], Iterator[dict]], cache_dir: str | Path) -> Dataset:
    """Write packed sequences to an Arrow file in `cache_dir`, in bounded memory, and open it as a `Dataset`.

    Args:
        sequences: returns a fresh iterator over what [`pack`] yields.
        cache_dir: where the file goes; it must outlive the dataset.

    Raises:
        ValueError: there was not a single sequence.
    """
    if next(sequences(), None) is None:
        raise ValueError(NO_TEXT)
    # a fresh fingerprint: `datasets` would otherwise reuse an old file although the text behind it has changed
    try:
        return Dataset.from_generator(
            sequences, features=FEATURES, cache_dir=str(cache_dir), fingerprint=uuid4().hex, keep_in_memory=False
        )
    except DatasetGenerationError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None  # it says what is wrong, and where
