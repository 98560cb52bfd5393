"""Chunking: documents → token chunks of a fixed length, each with the tokens that follow it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .filters import Scalar, check_metadata
from .tokenization import BulkTokenizer

CHUNK_SIZE = 64  # tokens in a chunk, unless another size is asked for; RetroConfig has the same default
MAX_CHUNK_SIZE = 4096  # tokens; Milvus stores no longer array
MAX_ID_BYTES = 4096  # of a document id
# Documents are tokenized in batches: enough text to keep the threads busy, little enough to fit in
# memory.
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its id in the knowledge base. Both may be any Unicode text.

    Attributes:
        id: the document's id, 1 to 4096 bytes of UTF-8.
        text: the text.
        metadata: further facts such as source, date and license, which searches and deletions can
            be filtered by. Up to 32 named strings, finite numbers and truth values.

    Raises:
        ValueError: the id is empty or too long; the id or the text contains a lone surrogate (half
            a character, which UTF-8 cannot write); or the metadata cannot be stored.
        TypeError: the id or the text is not a string.
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
        raise ValueError("A document has an empty id. Give it an id of at least one character.")
    if len(doc_id.encode()) > MAX_ID_BYTES:
        raise ValueError(f"The document id {doc_id[:60]!r}… is longer than {MAX_ID_BYTES} bytes of UTF-8. Shorten it.")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document.

    Attributes:
        doc_id: the document's id.
        index: the chunk's number in its document, from 0.
        tokens: 1 to chunk_size token ids; only a document's last chunk has fewer than chunk_size.
        continuation: up to chunk_size token ids that follow in the document; empty for the last
            chunk.
        metadata: the document's metadata.
    """

    doc_id: str
    index: int
    tokens: Sequence[int]
    continuation: Sequence[int]
    metadata: Mapping[str, Scalar] = field(default_factory=dict)


def source_names(texts: Iterable[Document | Chunk]) -> set[str]:
    """Collect the names of the sources in the metadata of documents or chunks."""
    return {str(text.metadata["source"]) for text in texts if "source" in text.metadata}


def split_tokens(document: Document, tokens: Sequence[int], chunk_size: int) -> Iterator[Chunk]:
    """Cut one document's tokens into chunks."""
    for index, start in enumerate(range(0, len(tokens), chunk_size)):
        middle = start + chunk_size
        continuation = tokens[middle : middle + chunk_size]
        yield Chunk(document.id, index, tokens[start:middle], continuation, document.metadata)


def tokenize_documents(documents: Iterable[Document], tokenizer: BulkTokenizer) -> Iterator[tuple[Document, list[int]]]:
    """Yield each document with its token ids, in order and in bounded memory."""
    for batch in document_batches(documents):
        yield from zip(batch, tokenizer.encode_batch([document.text for document in batch]), strict=True)


def chunk_documents(documents: Iterable[Document], tokenizer: BulkTokenizer, chunk_size: int) -> Iterator[Chunk]:
    """Stream documents into chunks. A document without tokens leaves no chunk.

    Args:
        documents: any iterable; it is read once, a batch at a time.
        tokenizer: computes the token ids.
        chunk_size: tokens in a chunk.

    Raises:
        ValueError: chunk_size is out of its range, or the tokenizer loses text.
    """
    check_chunk_size(chunk_size)
    tokenizer.check_keeps_text()
    for document, tokens in tokenize_documents(documents, tokenizer):
        yield from split_tokens(document, tokens, chunk_size)


def check_chunk_size(chunk_size: int) -> None:
    """Raise ValueError unless chunk_size is from 1 to 4096 tokens."""
    if not 1 <= chunk_size <= MAX_CHUNK_SIZE:
        raise ValueError(f"chunk_size must be between 1 and {MAX_CHUNK_SIZE} tokens, got {chunk_size}.")


def document_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into lists of at most 256 documents and about a million characters."""
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
