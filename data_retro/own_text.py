"""A warning where the knowledge base holds the training text itself under other ids."""

import logging
from collections import Counter

from retrieval import BulkTokenizer, MilvusRetriever

logger = logging.getLogger(__name__)

CHUNKS_SAMPLED = 8  # of a document


def warn_of_own_text(
    samples: dict[str, list[dict[str, str]]], tokenizer: BulkTokenizer, retriever: MilvusRetriever
) -> None:
    """Say so where the knowledge base holds a source's text under other ids, so that its chunks would read themselves.

    Args:
        samples: some documents {"id", "text"} of each source; those shorter than a chunk tell nothing.
    """
    size = retriever.chunk_size
    seen = min(size, retriever.neighbor_length)
    for source, documents in samples.items():
        beginnings = [document["text"][: 20 * CHUNKS_SAMPLED * size] for document in documents]  # more than enough
        for document, tokens in zip(documents, tokenizer.encode_batch(beginnings), strict=True):
            chunks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)[:CHUNKS_SAMPLED]]
            if not chunks:
                continue
            found = retriever.retrieve(chunks, exclude_doc_ids=[{document["id"]}] * len(chunks))
            names = Counter(
                name
                for chunk, neighbors, theirs in zip(chunks, found.ids.tolist(), found.doc_ids, strict=True)
                for name in {name for ids, name in zip(neighbors, theirs, strict=True) if ids[:seen] == chunk[:seen]}
                if name is not None
            )
            name, copies = names.most_common(1)[0] if names else ("", 0)
            if 2 * copies > len(chunks):
                logger.warning(
                    "%s: the knowledge base has the text of %r in a document of another id, %r (%d of %d chunks). Its chunks then "
                    "read themselves, and what is learned, and measured, is to copy. Ids begin with the name of the file or "
                    "folder that was ingested, or are doc_id_field: use the same here, or leave copies of a text out.",
                    source,
                    document["id"],
                    name,
                    copies,
                    len(chunks),
                )
                break  # one is enough of a source
