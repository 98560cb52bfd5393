"""Where tests keep collections, Milvus Lite or a server, and the rows in them."""

from retrieval import MilvusStore, chunk_documents

CHUNK = 8


class Place:
    """Where a test has its collection: Milvus Lite or a server."""

    def __init__(self, uri, name, is_lite):
        self.uri, self.name, self.is_lite = uri, name, is_lite
        self.opened = []

    def store(self, name=None, **kwargs):
        self.opened.append(MilvusStore(self.uri, name or self.name, **kwargs))
        return self.opened[-1]


def rows_of(store):
    """All rows, without their keys and vectors."""
    fields = ("doc_id", "chunk_index", "tokens", "continuation")
    return sorted(
        (r["doc_id"], r["chunk_index"], list(r["tokens"]), list(r["continuation"])) for r in store.scan(fields)
    )


def expected_rows(documents, tokenizer):
    chunks = chunk_documents(documents, tokenizer, CHUNK)
    return sorted((c.doc_id, c.index, list(c.tokens), list(c.continuation)) for c in chunks)
