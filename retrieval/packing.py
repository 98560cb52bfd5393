"""Packing: documents → sequences of one length, each chunk with the ids of the documents it touches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

from datasets import Dataset, Features, List, Value

FEATURES = Features({"input_ids": List(Value("int32")), "doc_ids": List(List(Value("string")))})


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
    tokens: list[int] = []
    touched: list[list[str]] = []
    for doc_id, document in documents:
        if not len(document):
            continue
        rest = [*document, end_of_text_id]
        start = 0
        while start < len(rest):
            piece = rest[start : start + block_size - len(tokens)]
            first_chunk, last_chunk = len(tokens) // chunk_size, (len(tokens) + len(piece) - 1) // chunk_size
            touched.extend([] for _ in range(last_chunk + 1 - len(touched)))
            for ids in touched[first_chunk:]:
                if doc_id not in ids:
                    ids.append(doc_id)
            tokens += piece
            start += len(piece)
            if len(tokens) == block_size:
                yield {"input_ids": tokens, "doc_ids": touched}
                tokens, touched = [], []
    if len(tokens) > 1:
        yield {"input_ids": tokens, "doc_ids": touched}


def packed_dataset(sequences: Callable[[], Iterator[dict]], cache_dir: str | Path) -> Dataset:
    """Write packed sequences to an Arrow file in `cache_dir`, in bounded memory, and open it as a `Dataset`.

    Args:
        sequences: returns a fresh iterator over what [`pack`] yields.
        cache_dir: where the file goes; it must outlive the dataset.

    Raises:
        ValueError: there was not a single sequence.
    """
    if next(sequences(), None) is None:
        raise ValueError("There is no text to pack: every document is empty, or there are none.")
    # a fresh fingerprint: `datasets` would otherwise reuse an old file although the text behind it has changed
    return Dataset.from_generator(
        sequences, features=FEATURES, cache_dir=str(cache_dir), fingerprint=uuid4().hex, keep_in_memory=False
    )
