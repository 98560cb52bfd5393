"""Hashes of texts. Collections store them, so they must never change."""

import hashlib


def sha256(text: str) -> bytes:
    """Return the SHA-256 of the text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).digest()


def hash64(text: str) -> int:
    """Return the first 64 bits of [`sha256`] as a signed integer, as Milvus stores them."""
    return int.from_bytes(sha256(text)[:8], "big", signed=True)
