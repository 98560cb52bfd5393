"""Addresses of knowledge bases: a Milvus Lite file or a server, and how to connect to it."""

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import KnowledgeBaseError

SCHEMES = ("http", "https", "tcp")


@dataclass(frozen=True)
class TLS:
    """Certificates for an https:// address, beyond the system's certificate authorities.

    All are paths of PEM files, except `server_name`.

    Attributes:
        authority: the certificate that signed the server's.
        certificate, key: this client's own, if the server asks for one (two-way TLS). Give both or
            neither.
        server_name: the name in the server's certificate, if it is not the host of the URI.

    Raises:
        ValueError: only one of certificate and key is given.
        FileNotFoundError: a file is missing.
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


@dataclass(frozen=True)
class MilvusAddress:
    """A Milvus Lite file or a server, and all that a connection to it needs.

    A pickled address holds no token and no password. The process that unpickles it takes them from
    the environment variable MILVUS_TOKEN.

    Args:
        uri: a path that ends in .db (Milvus Lite), or http(s)://host:port[/database]. Default: the
            environment variable MILVUS_URI.
        token: "user:password" or an API key. Default: the one in the URI, or MILVUS_TOKEN.
        database: the server's database. Default: the one in the URI, or the server's default.
        tls: certificates for https://.
        timeout: seconds that a call keeps trying while Milvus is away or not ready.

    Attributes:
        uri: as given, without user and password.
        path: absolute path of the Milvus Lite file, links resolved; None for a server.

    Raises:
        KnowledgeBaseError: the URI is empty, or names neither a server nor a Milvus Lite file.
        ValueError: the timeout is not positive.
    """

    uri: str | os.PathLike[str] | None = None
    token: str | None = field(default=None, repr=False)
    database: str | None = None
    tls: TLS | None = None
    timeout: float = 120.0
    path: str | None = field(default=None, init=False)
    needs_token: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {self.timeout}.")
        uri, path = locate(self.uri)
        token = None
        if path is None:
            scheme, separator, rest = uri.partition("://")
            secret, _, place = rest.rpartition("@")
            uri = scheme + separator + place
            token = self.token or secret or os.environ.get("MILVUS_TOKEN") or None
        resolved = {"uri": uri, "path": path, "token": token, "needs_token": token is not None}
        for name, value in resolved.items():
            object.__setattr__(self, name, value)  # the fields are frozen from here on

    def bytes_on_disk(self) -> int | None:
        """Return the bytes of the Milvus Lite file with all its collections; None for a server."""
        if self.path is None:
            return None
        files = [Path(self.path), *Path(self.path).rglob("*")]
        return sum(file.stat().st_size for file in files if file.is_file())

    @classmethod
    def of(cls, uri: "str | os.PathLike[str] | MilvusAddress | None") -> "MilvusAddress":
        """Return the address itself, or the one that a URI names."""
        return uri if isinstance(uri, MilvusAddress) else cls(uri)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"token": None}

    def __copy__(self) -> "MilvusAddress":
        return self  # it is frozen, and a copy made by way of the pickled state would lose the token

    def __deepcopy__(self, memo: dict) -> "MilvusAddress":
        return self

    @property
    def is_file(self) -> bool:
        """True for a Milvus Lite file, False for a server."""
        return self.path is not None

    def secret(self) -> str | None:
        """Return the token, in an unpickled address the one of MILVUS_TOKEN.

        Raises:
            KnowledgeBaseError: the address needs a token, and this process has none.
        """
        token = None if self.is_file else self.token or os.environ.get("MILVUS_TOKEN") or None
        if self.needs_token and not token:
            raise KnowledgeBaseError(
                f"{self.uri} was opened with a token, and tokens are not pickled: set MILVUS_TOKEN in this process."
            )
        return token

    def options(self) -> dict[str, Any]:
        """Return token, database and certificates under pymilvus' names."""
        options: dict[str, Any] = {"token": token} if (token := self.secret()) else {}
        if self.database:
            options["db_name"] = self.database
        return options | (self.tls.options() if self.tls else {})


def locate(uri: str | os.PathLike[str] | None) -> tuple[str, str | None]:
    """Read a URI as people type it: ~/kb.db, kb.db/, file:///data/kb.db, localhost:19530.

    Args:
        uri: None stands for the environment variable MILVUS_URI.

    Returns:
        (uri, None) for a server; (uri, absolute path without links) for a Milvus Lite file.

    Raises:
        KnowledgeBaseError: the URI is empty, or names neither a server nor a Milvus Lite file.
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
    return re.sub(r"(?s)^(\w+://)?.*@", r"\1", uri)


def no_file(uri: str) -> str:
    """Return the message for a Milvus Lite file that is not there."""
    return f"There is no knowledge base file {uri}: build it with `python -m retrieval ingest`."


def answers(uri: str) -> bool:
    """Return True if something listens at the address."""
    parts = urlsplit(uri)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 19530)
        with socket.create_connection((parts.hostname or "", port), timeout=3):
            return True
    except (OSError, ValueError, TypeError):
        return False
