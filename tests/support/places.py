"""Places for tests' collections, and the rows in them."""

from retrieval import MilvusStore, chunk_documents

CHUNK = 8


class Place:
    """A Milvus Lite file or a server that holds a test's collection."""

    def __init__(self, uri, name, is_lite):
        self.uri, self.name, self.is_lite = uri, name, is_lite
        self.opened = []

    def store(self, name=None, **kwargs):
        """Connect to the test's collection, or to another one."""
        self.opened.append(MilvusStore(self.uri, name or self.name, **kwargs))
        return self.opened[-1]


def rows_of(store):
    """Return all rows of a collection, sorted, without their keys and vectors."""
    fields = ("doc_id", "chunk_index", "tokens", "continuation")
    return sorted(
        (r["doc_id"], r["chunk_index"], list(r["tokens"]), list(r["continuation"])) for r in store.scan(fields)
    )


def expected_rows(documents, tokenizer):
    """Return what [`rows_of`] should return after these documents were ingested."""
    chunks = chunk_documents(documents, tokenizer, CHUNK)
    return sorted((c.doc_id, c.index, list(c.tokens), list(c.continuation)) for c in chunks)
