"""Warn if the knowledge base holds the training text itself under other ids."""

import logging
from collections import Counter

from retrieval import BulkTokenizer, MilvusRetriever

logger = logging.getLogger(__name__)

CHUNKS_SAMPLED = 8  # per document
CHARACTERS_PER_TOKEN = 20  # more than any text has, so that a document's beginning holds the chunks sampled


def warn_of_own_text(
    samples: dict[str, list[dict[str, str]]], tokenizer: BulkTokenizer, retriever: MilvusRetriever
) -> None:
    """Log a warning for each source whose text the knowledge base holds under other ids.

    Chunks of such a source would read themselves.

    Args:
        samples: some documents {"id", "text"} by source. Documents shorter than a chunk are
            skipped.
        tokenizer: the knowledge base's tokenizer.
        retriever: the knowledge base.
    """
    size = retriever.chunk_size
    compared = min(size, retriever.neighbor_length)
    for source, documents in samples.items():
        beginnings = [document["text"][: CHARACTERS_PER_TOKEN * CHUNKS_SAMPLED * size] for document in documents]
        for document, tokens in zip(documents, tokenizer.encode_batch(beginnings), strict=True):
            chunks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)[:CHUNKS_SAMPLED]]
            if not chunks:
                continue
            found = retriever.retrieve(chunks, exclude_doc_ids=[{document["id"]}] * len(chunks))
            copies_by_id = Counter(
                doc_id
                for chunk, neighbors, doc_ids in zip(chunks, found.ids.tolist(), found.doc_ids, strict=True)
                for doc_id in {
                    doc_id
                    for ids, doc_id in zip(neighbors, doc_ids, strict=True)
                    if ids[:compared] == chunk[:compared] and doc_id is not None
                }
            )
            doc_id, copies = copies_by_id.most_common(1)[0] if copies_by_id else ("", 0)
            if 2 * copies > len(chunks):
                logger.warning(
                    "%s: the knowledge base has the text of %r in a document of another id, %r (%d of %d chunks). Its "
                    "chunks read themselves, so training and evaluation reward copying. Ids begin with the name of the "
                    "file or folder that was ingested, or are doc_id_field: use the same here, or remove the copies.",
                    source,
                    document["id"],
                    doc_id,
                    copies,
                    len(chunks),
                )
                break  # one warning per source is enough
