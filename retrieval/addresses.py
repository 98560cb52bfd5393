"""Addresses of knowledge bases: what people type → a server's address or a Milvus Lite file's path; and certificates."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import KnowledgeBaseError

SCHEMES = ("http", "https", "tcp")


@dataclass(frozen=True)
class TLS:
    """Certificates for an https:// address, beyond the system's certificate authorities. All are paths but `server_name`.

    Attributes:
        authority: certificate (PEM) that the server's must be signed by.
        certificate, key: this client's own, where the server asks for one (two-way TLS); both or neither.
        server_name: the name in the server's certificate, if it is not the host of the URI.
    """

    authority: str | None = None
    certificate: str | None = None
    key: str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("Two-way TLS needs both the client's certificate and its key; only one was given.")
        for path in (self.authority, self.certificate, self.key):
            if path is not None and not Path(path).is_file():
                raise FileNotFoundError(f"There is no TLS file {path}.")

    def options(self) -> dict[str, Any]:
        """Return the settings under pymilvus' names."""
        authority = "server_pem_path" if self.certificate is None else "ca_pem_path"
        options = {
            authority: self.authority,
            "client_pem_path": self.certificate,
            "client_key_path": self.key,
            "server_name": self.server_name,
        }
        return {"secure": True} | {name: value for name, value in options.items() if value is not None}


def locate(uri: str | os.PathLike | None) -> tuple[str, str | None]:
    """Read the uri of a knowledge base, as people type it: ~/kb.db, kb.db/, file:///data/kb.db, localhost:19530.

    Args:
        uri: None stands for MILVUS_URI.

    Returns:
        (uri, None) for a server; (uri, absolute path without links) for a Milvus Lite file.

    Raises:
        KnowledgeBaseError: it is empty, or names neither a server nor a Milvus Lite file.
    """
    text = (os.environ.get("MILVUS_URI", "") if uri is None else os.fsdecode(uri)).strip()
    if not text:
        raise KnowledgeBaseError("No knowledge base is named: give a uri (a .db file or http://…) or set MILVUS_URI.")
    if re.fullmatch(r"([^:/@]+:[^/]+@)?[\w.-]+:\d+(/\w*)?", text):
        text = f"http://{text}"
    is_file = text.lower().startswith("file:")
    if re.match(r"(?i)(https?|tcp):", text) or ("://" in text and not is_file):  # http:/host is no folder
        return _server(text), None
    path = text
    if is_file:
        path = unquote(re.sub(r"(?i)^file:(//)?(localhost(?=/))?", "", text))
    path = os.path.abspath(os.path.expanduser(path))
    if not path.lower().endswith(".db"):
        raise KnowledgeBaseError(
            f"{_shown(text)!r} names no knowledge base. Give http://host:port, or a file that ends in .db (kb.db)."
        )
    return text.rstrip("/\\"), os.path.realpath(path)


def _server(uri: str) -> str:
    scheme, shown = uri.partition("://")[0], _shown(uri)
    if scheme.lower() not in SCHEMES:
        raise KnowledgeBaseError(
            f"{shown!r} does not name a knowledge base: give http://host:port, https://host:port, or a .db file."
        )
    try:
        parts = urlsplit(uri)
        if not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise KnowledgeBaseError(
            f"{shown!r} is not the address of a server: it must be {scheme}://host:port, with a port from 1 to 65535."
        ) from None
    return uri.rstrip("/")


def _shown(uri: str) -> str:
    """Return an address without user and password, which errors must not repeat."""
    scheme, place = re.fullmatch(r"(\w+://)?(?:.*@)?(.*)", uri, re.DOTALL).groups(default="")
    return scheme + place


def no_file(uri: str) -> str:
    """Return the message for a Milvus Lite file that is not there."""
    return f"There is no knowledge base file {uri}: build it with `python -m retrieval ingest`."
