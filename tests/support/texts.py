"""Write files of rows, and read back what becomes of them."""

import json

from retrieval import Source, read_documents


def ids_and_texts(path, **settings):
    """Return the id and the text of each document in a source."""
    return [(document.id, document.text) for document in read_documents(Source(str(path), **settings))]


def write_lines(path, rows, encoding="utf-8"):
    """Write rows to a file, one JSON object per line; return the path."""
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding))
    return path
