"""A collection for one of the three searches, with the truth about its rows."""

import numpy as np

from retrieval import MilvusRetriever, MilvusStore, chunk_documents, ingest

from .bm25 import bm25, words

SIZE = 16  # tokens in a chunk: enough for several words


class Built:
    """A collection for one of the three searches, with the truth about its rows."""

    def __init__(self, uri, search, documents, tokenizer, embedder, **kwargs):
        self.search, self.tokenizer, self.documents = search, tokenizer, documents
        self.embedder = None if search == "bm25" else embedder
        self.store = MilvusStore(uri, search)
        self.report = ingest(documents, self.store, tokenizer, self.embedder, chunk_size=SIZE, search=search, **kwargs)
        self.chunks = list(chunk_documents(documents, tokenizer, SIZE))
        self.texts = [tokenizer.decode(chunk.tokens) for chunk in self.chunks]

    def retriever(self, **kwargs):
        return MilvusRetriever(self.store, self.tokenizer, self.embedder, **kwargs)

    def scores(self, query):
        """Return the score of every row for a query of token ids."""
        text = self.tokenizer.decode(query)
        if self.search == "bm25":
            n = len(set(words(text)))
            return [score / (score + n) if score else 0.0 for score in bm25(text, self.texts)]
        return list(self.embedder.encode(self.texts) @ self.embedder.encode([text])[0])

    def row(self, found, number, place):
        """Return the number of the chunk that was found."""
        key = found.doc_ids[number][place], int(found.chunk_indices[number, place])
        return next(i for i, chunk in enumerate(self.chunks) if (chunk.doc_id, chunk.index) == key)


def queries_of(built, count=12):
    """Return queries of 1 to SIZE tokens from the documents, and their own documents."""
    chunks = built.chunks[:: len(built.chunks) // count][:count]
    lengths = [SIZE, 1, 5, SIZE - 1, 9]
    return [list(c.tokens)[: lengths[i % 5]] for i, c in enumerate(chunks)], [{c.doc_id} for c in chunks]


def longest_common_run(a, b):
    """Return the length of the longest run of tokens that two texts share."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else 0
    return table.max()
