"""Hashes of texts: the same on every machine and in every version, since collections keep them."""

import hashlib


def sha256(text: str) -> bytes:
    """Return the hash of the text's UTF-8."""
    return hashlib.sha256(text.encode()).digest()


def hash64(text: str) -> int:
    """Return 64 bits of that hash, signed, as Milvus stores integers."""
    return int.from_bytes(sha256(text)[:8], "big", signed=True)
