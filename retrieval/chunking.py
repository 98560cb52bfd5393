"""Chunking: documents → token chunks of a fixed length, each with the tokens that follow it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .filters import Scalar, check_metadata
from .tokenization import BulkTokenizer

# Documents are tokenized in batches: enough text to keep the threads busy, little enough to forget about memory.
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1_000_000
MAX_ID_BYTES = 4096  # of a document id


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the id under which the knowledge base knows it. Both may be any Unicode text.

    Attributes:
        metadata: what else is known of it, such as source, date and license; searches and deletions can be filtered by it.
            Up to 32 named strings, finite numbers and truth values.

    Raises:
        ValueError: the id is empty or longer than 4096 bytes, either contains a lone surrogate (half a character, which
            UTF-8 cannot write), or the metadata cannot be stored.
        TypeError: either is not a string.
    """

    id: str
    text: str
    metadata: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("text", self.text)):
            if not isinstance(value, str):
                raise TypeError(f"The {name} of document {self.id!r} must be a string, got {type(value).__name__}.")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"The {name} of document {self.id!r} has a lone surrogate, {value[error.start]!r}, at position "
                    f"{error.start}: it is not valid text. Decode the source again, or replace the character."
                ) from None
        check_id(self.id)
        check_metadata(self.metadata)


def check_id(doc_id: str) -> None:
    """Raise ValueError unless a document's id has 1 to 4096 bytes of UTF-8."""
    if not doc_id:
        raise ValueError("A document needs an id that is not empty.")
    if len(doc_id.encode()) > MAX_ID_BYTES:
        raise ValueError(f"The document id {doc_id[:60]!r}… is longer than {MAX_ID_BYTES} bytes of UTF-8.")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document.

    Attributes:
        doc_id: the document's id.
        index: the chunk's number in its document, from 0.
        tokens: 1 to chunk_size token ids; fewer than chunk_size only in the last chunk of a document.
        continuation: the up to chunk_size token ids that follow in the document; empty for the last chunk.
        metadata: the document's.
    """

    doc_id: str
    index: int
    tokens: Sequence[int]
    continuation: Sequence[int]
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


def source_names(texts: Iterable[Document | Chunk]) -> set[str]:
    """Where these are from, as far as their metadata tells."""
    return {str(text.metadata["source"]) for text in texts if "source" in text.metadata}


def split_tokens(document: Document, tokens: Sequence[int], chunk_size: int) -> Iterator[Chunk]:
    """Cut one document's tokens into chunks."""
    for index, start in enumerate(range(0, len(tokens), chunk_size)):
        middle = start + chunk_size
        continuation = tokens[middle : middle + chunk_size]
        yield Chunk(document.id, index, tokens[start:middle], continuation, document.metadata)


def tokenize_documents(documents: Iterable[Document], tokenizer: BulkTokenizer) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its token ids, in order, in bounded memory."""
    for batch in document_batches(documents):
        yield from zip(batch, tokenizer.encode_batch([document.text for document in batch]), strict=True)


def chunk_documents(documents: Iterable[Document], tokenizer: BulkTokenizer, chunk_size: int) -> Iterator[Chunk]:
    """Stream documents into chunks. A document without tokens leaves no chunk.

    Args:
        documents: any iterable; read once, a batch at a time.
        tokenizer: gives the token ids.
        chunk_size: tokens in a chunk.
    """
    check_chunk_size(chunk_size)
    for document, tokens in tokenize_documents(documents, tokenizer):
        yield from split_tokens(document, tokens, chunk_size)


def check_chunk_size(chunk_size: int) -> None:
    """Raises ValueError unless 1 <= chunk_size <= 4096, the longest array that Milvus stores."""
    if not 1 <= chunk_size <= 4096:
        raise ValueError(f"chunk_size must be between 1 and 4096 tokens, got {chunk_size}.")


def document_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Some million characters of documents at a time."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
