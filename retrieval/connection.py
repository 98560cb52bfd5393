"""MilvusConnection: one way to a Milvus Lite file, a server, a cluster or a cloud, and calls that outlast its pauses."""

import json
import logging
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from pymilvus import MilvusClient, MilvusException
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from .errors import KnowledgeBaseError

logger = logging.getLogger(__name__)

FAILURES = (MilvusException, grpc.RpcError)
UNAVAILABLE = 2  # how pymilvus numbers a connection that cannot be made
NOT_LOADED = {101, 103, 106, 201, 202, 601}  # as after a server's restart, until it has read its segments again
# Milvus' own numbers of what passes by itself: over the rate limit, a node or channel that comes back
PASSING = NOT_LOADED | {UNAVAILABLE, 4, 8, 401, 500, 501, 502, 503, 600, 602, 900, 901, 902}
# "milvuslite is closed": said by a process that serves a file to this one, and is just ending
PASSING_WORDS = (
    "milvuslite is closed",
    "shard leader",
    "shard delegator",
    "not ready",
    "no available",
    "node offline",
    "channel not",
)
COLLECTION_NOT_FOUND, DATABASE_NOT_FOUND = 100, 800
FULL = {3: "memory", 7: "disk space", 9: "disk space or quota"}
# Milvus Lite lets one process open a file; how long to wait until that one has said under which address it serves it
OWNER_SECONDS = 5.0
# A Milvus Lite file is served by one embedded server a process, whatever closes a client: connections are counted here.
_OPEN_FILES: Counter[str] = Counter()


@dataclass(frozen=True)
class TLS:
    """What an https:// address needs beyond the system's certificate authorities. All are paths but `server_name`.

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
        """As pymilvus names them."""
        authority = "server_pem_path" if self.certificate is None else "ca_pem_path"
        options = {
            authority: self.authority,
            "client_pem_path": self.certificate,
            "client_key_path": self.key,
            "server_name": self.server_name,
        }
        return {"secure": True} | {name: value for name, value in options.items() if value is not None}


class MilvusConnection:
    """A connection that is made again when it breaks.

    A Milvus Lite file is opened by one process of a machine, which serves it to the others on its loopback interface;
    they find its address in a small file beside it. When that process ends, another one that needs the file opens it.

    Args:
        uri: a file path ending in .db (Milvus Lite) or http(s)://host:port, with /database if need be. Default: MILVUS_URI.
        token: "user:password" or an API key, never shown. Default: MILVUS_TOKEN.
        database: of the server; None is the one in the URI, or the default.
        tls: for https:// with certificates of one's own.
        timeout: seconds that a call goes on trying while Milvus is away or not ready.

    Raises:
        KnowledgeBaseError: no uri; a file that cannot be opened; no server at the address, or none that lets one in.
        ValueError: a timeout that is not positive.
    """

    def __init__(
        self,
        uri: str | os.PathLike | None = None,
        *,
        token: str | None = None,
        database: str | None = None,
        tls: TLS | None = None,
        timeout: float = 120.0,
    ) -> None:
        uri = os.environ.get("MILVUS_URI") if uri is None else os.fspath(uri)
        if not uri:
            raise KnowledgeBaseError(
                "No knowledge base is named: give a uri (a .db file or http://…) or set MILVUS_URI."
            )
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}.")
        self.uri, self.database, self.timeout = uri, database, timeout
        self.is_file = "://" not in uri
        if self.is_file and not uri.endswith(".db"):
            raise KnowledgeBaseError(f"{uri!r} is no server's address, and a Milvus Lite file must end in .db.")
        self._path = os.path.abspath(uri)
        self._token = None if self.is_file else token or os.environ.get("MILVUS_TOKEN")
        self._tls = tls
        self._closed = False
        self.owns_file = False  # this process opened it
        self.serving = ""  # the address that answers, which for a file is on the loopback interface
        self.client: MilvusClient | None = None
        try:
            self._connect()
        except BaseException:
            self.close()  # or a file would stay open that nobody has
            raise

    def __repr__(self) -> str:
        return f"MilvusConnection({self.address})"

    @property
    def address(self) -> str:
        """The uri without the user and password that it may carry."""
        scheme, separator, rest = self.uri.partition("://")
        return scheme + separator + rest.rpartition("@")[2]

    @property
    def version(self) -> tuple[int, ...]:
        """(major, minor) of the server, or of Milvus Lite."""
        text = self._version.removeprefix("milvus_lite-").removeprefix("v")
        return tuple(int(part) for part in text.split(".")[:2])

    @property
    def is_lite(self) -> bool:
        """Whether Milvus Lite answers: a file, or one that another process serves under an http:// address."""
        return self.is_file or "milvus_lite" in self._version

    @cached_property
    def _version(self) -> str:
        return self.call("get_server_version")

    def _connect(self) -> None:
        options = {"token": self._token} if self._token else {}
        if self.database:
            options["db_name"] = self.database
        if self._tls:
            options |= self._tls.options()
        self.serving = self._serve_or_find() if self.is_file else self.address
        try:
            self.client = MilvusClient(
                self.serving if self.is_file else self.uri, timeout=min(self.timeout, 10.0), **options
            )
            self.client.list_collections(timeout=min(self.timeout, 10.0))  # only now a database is looked for
        except (*FAILURES, OSError, ValueError) as error:
            raise KnowledgeBaseError(self._why_no_connection(error)) from error

    def _serve_or_find(self) -> str:
        """Address of the embedded server that has the file open: this process's, or another one's."""
        try:
            from milvus_lite.server_manager import server_manager_instance
        except ImportError as error:  # there is none for Windows
            raise KnowledgeBaseError("Milvus Lite is not installed; pass the address of a Milvus server.") from error
        embedded = logging.getLogger("milvus_lite.server_manager")
        deadline = time.monotonic() + OWNER_SECONDS
        Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        existed = Path(self._path).exists()
        while True:
            embedded.addFilter(_drop_tracebacks)  # of what is said in a sentence below
            try:
                address = server_manager_instance.start_and_get_uri(self._path)
            finally:
                embedded.removeFilter(_drop_tracebacks)
            if address:
                if not self.owns_file:
                    if not _OPEN_FILES[self._path]:  # nobody makes a collection before the file is published
                        _remove_half_made(self._path)
                    self.owns_file = True
                    _OPEN_FILES[self._path] += 1
                    self._publish(address)
                return address
            owner = self._published()
            if owner is not None and owner["host"] == socket.gethostname() and _answers(owner["address"]):
                return owner["address"]
            if time.monotonic() > deadline:
                raise KnowledgeBaseError(self._why_not_opened(existed, owner))
            time.sleep(0.1)

    @property
    def _notice(self) -> Path:
        return Path(self._path + ".served")

    def _publish(self, address: str) -> None:
        notice = {"address": address, "host": socket.gethostname(), "process": os.getpid()}
        draft = Path(f"{self._path}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(notice))
        draft.replace(self._notice)

    def _published(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._notice.read_text())
        except (OSError, ValueError):
            return None

    def _why_not_opened(self, existed: bool, owner: dict[str, Any] | None) -> str:
        if owner is not None and owner["host"] != socket.gethostname():
            return (
                f"{self.uri} is in use by process {owner['process']} on {owner['host']}. A Milvus Lite file can be shared "
                "by the processes of one machine only: for several machines start a Milvus server and pass its address."
            )
        if not existed or Path(self._path).is_file():
            return f"{self.uri} is not a Milvus Lite knowledge base, or its folder cannot be written."
        return (
            f"{self.uri} could not be opened: it is damaged, its folder cannot be written, or another program than this "
            "one has it open. Close that program, or serve the file with `python -m retrieval serve`."
        )

    def _why_no_connection(self, error: Exception) -> str:
        if getattr(error, "code", None) == DATABASE_NOT_FOUND or "database" in str(error) and "exist" in str(error):
            name = self.database or self.address.rpartition("/")[2]
            return f"There is no database {name!r} at {self.address}: create it, or name another one."
        if self.is_file or not _answers(self.uri):
            return f"No connection to {self.address}: nothing answers there. Is the server up, and the address right?"
        return (
            f"{self.address} answers, but does not let this program in: check the token (MILVUS_TOKEN), and whether the "
            "server wants https:// and which certificate."
        )

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of `MilvusClient`. While Milvus is away or not ready, wait and try again, for `timeout` seconds.

        All calls of a knowledge base may be repeated: rows are written under keys that depend on their text alone.

        Raises:
            KnowledgeBaseError: refused for good, or not answered in time; names the address and what to do.
        """

        def attempt() -> Any:
            if self.client is None:
                self._connect()
            return getattr(self.client, method)(*args, timeout=self.timeout, **kwargs)

        started = time.monotonic()
        retrying = Retrying(
            retry=retry_if_exception(self._passes),
            stop=stop_after_delay(self.timeout),
            wait=wait_exponential(multiplier=0.1, max=5),
            before_sleep=self._recover(args),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except KnowledgeBaseError as error:
            waited = time.monotonic() - started
            raise KnowledgeBaseError(f"{error} Tried for {waited:.0f} s.") from error
        except FAILURES as error:
            raise KnowledgeBaseError(self._explain(method, args, error, time.monotonic() - started)) from error

    def _passes(self, error: BaseException) -> bool:
        """Whether it is worth trying again."""
        if isinstance(error, KnowledgeBaseError):  # no connection: a server that is being started again
            return True
        if isinstance(error, grpc.RpcError):
            return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        code = getattr(error, "code", None)
        if isinstance(code, grpc.StatusCode):  # pymilvus passes some on
            return code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        if self.is_file and self.owns_file:  # Milvus Lite numbers most of its errors 1, and none of them passes
            return code in NOT_LOADED
        text = str(error).lower()
        return isinstance(error, MilvusException) and (code in PASSING or any(word in text for word in PASSING_WORDS))

    def _recover(self, args: tuple) -> Callable[[RetryCallState], None]:
        def before_sleep(state: RetryCallState) -> None:
            error = state.outcome.exception()
            if state.attempt_number == 3:  # some tenths of a second are no news
                logger.warning(
                    "%s is not ready (%s); trying again for %.0f s.", self.address, _reason(error), self.timeout
                )
            if getattr(error, "code", None) in NOT_LOADED and args:
                try:
                    self.client.load_collection(args[0], timeout=self.timeout)
                except FAILURES as again:
                    logger.debug("Loading failed as well: %s", again)
            elif self.is_file and not self.owns_file:  # the process that served the file is gone, maybe for good
                self.client = None

        return before_sleep

    def _explain(self, method: str, args: tuple, error: Exception, seconds: float) -> str:
        code, where = getattr(error, "code", None), f"{args[0]!r} at {self.address}" if args else self.address
        if code == COLLECTION_NOT_FOUND:
            return f"Collection {where} is not there any more: it was dropped or renamed. Ingest it again, or import a copy."
        if code in FULL or "no space left" in str(error).lower() or "file too large" in str(error).lower():
            return (
                f"Milvus at {self.address} has no more {FULL.get(code, 'disk space')} ({_reason(error)}). What it "
                "acknowledged is kept; make room and run the same command again."
            )
        if self._passes(error):
            return (
                f"Milvus at {self.address} did not answer {method} for {seconds:.0f} s ({_reason(error)}). Is the server up, "
                "and its collection loaded? A longer wait can be asked for with `timeout`."
            )
        return f"Milvus refused {method} on {where}: {_reason(error)}."

    def close(self) -> None:
        """Let go. After the last one on a Milvus Lite file, another process can open the file."""
        if self._closed:
            return
        self._closed = True
        if self.client is not None:
            self.client.close()
        if self.owns_file:
            _OPEN_FILES[self._path] -= 1
            if not _OPEN_FILES[self._path]:
                from milvus_lite.server_manager import server_manager_instance

                self._notice.unlink(missing_ok=True)
                server_manager_instance.release_server(self._path)


def _remove_half_made(path: str) -> None:
    """Folders of collections whose making was killed before they had a schema: to Milvus Lite, which does not remove them, there
    is no such collection, and none can be made where its folder is."""
    for pattern in ("collections/*", "databases/*/collections/*"):
        for folder in Path(path).glob(pattern):
            if folder.is_dir() and not (folder / "schema.json").exists():
                shutil.rmtree(folder)


def _drop_tracebacks(record: logging.LogRecord) -> bool:
    return record.exc_info is None


def _reason(error: BaseException | None) -> str:
    return str(getattr(error, "message", None) or error).rstrip(".")


def _answers(uri: str) -> bool:
    """Whether something listens there."""
    parts = urlsplit(uri)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 19530)
        with socket.create_connection((parts.hostname, port), timeout=3):
            return True
    except (OSError, ValueError, TypeError):
        return False
