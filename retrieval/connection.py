"""MilvusConnection: one way to a Milvus Lite file, a server, a cluster or a cloud, and calls that outlast its pauses."""

import atexit
import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from pymilvus import MilvusClient, MilvusException
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from .addresses import TLS, locate, no_file
from .errors import KnowledgeBaseError
from .quiet import errors_are_raised

logger = logging.getLogger(__name__)

FAILURES = (MilvusException, grpc.RpcError)
UNAVAILABLE = 2  # how pymilvus numbers a connection that cannot be made
NOT_LOADED = {101, 103, 106, 201, 202, 601}  # as after a server's restart, until it has read its segments again
# Milvus' own numbers of what passes by itself: over the rate limit, a node or channel that comes back
PASSING = NOT_LOADED | {UNAVAILABLE, 4, 8, 401, 500, 501, 502, 503, 600, 602, 900, 901, 902}
# "milvuslite is closed": said by a process that serves a file to this one, and is just ending
# "schema.json.tmp' -> ": two changes of a collection's properties at once, in Milvus Lite
LITE_RACE = "schema.json.tmp' -> "
PASSING_WORDS = (
    LITE_RACE,
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
_OPENING = threading.RLock()
_INHERITED: list[Any] = []  # of a forked process: what its parent uses, which must not be shut down here
# Milvus permits a ping every 5 seconds, and pymilvus sends one every 10. The server inside Milvus Lite permits one in 5
# minutes and hangs up on who sends more ("too_many_pings"). It is on this machine, where a lost connection shows by itself.
NO_PINGS = {"grpc.keepalive_time_ms": 2**31 - 1}


class MilvusConnection:
    """A connection that is made again when it breaks.

    A Milvus Lite file is opened by one process of a machine, which serves it to the others on its loopback interface;
    they find its address in a small file beside it. When that process ends, another one that needs the file opens it.

    A copy is the same connection. A pickled or forked one connects anew in its process, on first use. A pickle holds no
    token and no password: the other process takes them from MILVUS_TOKEN.

    Args:
        uri: a file path ending in .db (Milvus Lite) or http(s)://host:port, with /database if need be. Default: MILVUS_URI.
        token: "user:password" or an API key, never shown. Default: the one in the uri, or MILVUS_TOKEN.
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
        uri, self._path = locate(uri)
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}.")
        scheme, separator, rest = uri.partition("://")
        secret, _, place = rest.rpartition("@")
        self.uri = uri if self.is_file else scheme + separator + place
        self.database, self.timeout = database, timeout
        self._token = None if self.is_file else token or secret or os.environ.get("MILVUS_TOKEN")
        self._needs_token = self._token is not None
        self._tls = tls
        self._closed = False
        self._begin()
        try:
            self._connect()
        except BaseException:
            self.close()  # or a file would stay open that nobody has
            raise

    def _begin(self) -> None:
        """Start without a connection."""
        self.client: MilvusClient | None = None
        self.owns_file = False  # this process opened it
        self.serving = ""  # the address that answers, which for a file is on the loopback interface
        self._version = ""
        self._process = 0  # in which it was connected

    def __getstate__(self) -> dict[str, Any]:
        kept = ("uri", "_path", "database", "timeout", "_tls", "_needs_token", "_closed")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._token = None
        self._begin()

    def __copy__(self) -> "MilvusConnection":
        return self

    def __deepcopy__(self, memo: dict) -> "MilvusConnection":
        return self

    def __repr__(self) -> str:
        return f"MilvusConnection({self.uri})"

    @property
    def is_file(self) -> bool:
        """True for a Milvus Lite file, False for the address of a server."""
        return self._path is not None

    @property
    def version(self) -> tuple[int, ...]:
        """(major, minor) of the server, or of Milvus Lite."""
        text = self._version.removeprefix("milvus_lite-").removeprefix("v")
        return tuple(int(part) for part in text.split(".")[:2])

    @property
    def is_lite(self) -> bool:
        """True if Milvus Lite answers: a file, or one that another process serves under an http:// address."""
        return self.is_file or "milvus_lite" in self._version

    def _connect(self) -> None:
        options = {"token": self._token} if self._token else {}
        if self.database:
            options["db_name"] = self.database
        if self._tls:
            options |= self._tls.options()
        self.serving = self._serve_or_find() if self.is_file else self.uri
        seconds = min(self.timeout, 10.0)

        def connect(**more: Any) -> MilvusClient:
            # dedicated: others are shared by address, also with connections that have other certificates or are closed
            return MilvusClient(self.serving, timeout=seconds, dedicated=True, **options, **more)

        client = None
        try:
            with errors_are_raised():
                client = connect(**({"grpc_options": NO_PINGS} if self.is_file else {}))
                self._version = client.get_server_version(timeout=seconds)
                if not self.is_file and self.is_lite:  # one that another process serves
                    client.close()
                    client = connect(grpc_options=NO_PINGS)
                client.list_collections(timeout=seconds)  # only now a database is looked for
        except (*FAILURES, OSError, ValueError) as error:
            if client is not None:
                client.close()
            raise KnowledgeBaseError(self._why_no_connection(error)) from error
        self.client, self._process = client, os.getpid()

    def _begin_here(self) -> None:
        """Start without a connection in a process that got this object pickled, or was forked with it.

        Raises:
            KnowledgeBaseError: the file or the token is not there, so that no attempt could connect.
        """
        with _OPENING:
            if self._process == os.getpid():
                return
            if self.client is not None:
                _INHERITED.append(self.client)
            self._begin()
            if self.is_file and not os.path.exists(self._path):
                raise KnowledgeBaseError(no_file(self._path))
            if not self.is_file:
                self._token = self._token or os.environ.get("MILVUS_TOKEN")
            if self._needs_token and not self._token:
                raise KnowledgeBaseError(
                    f"{self.uri} was opened with a token, and tokens are not pickled: set MILVUS_TOKEN in this process."
                )

    def _connect_again(self) -> None:
        """Connect unless another thread has done so."""
        with _OPENING:
            if self.client is None:
                try:
                    self._connect()
                except BaseException:
                    self._release_file()
                    raise

    def _serve_or_find(self) -> str:
        """Return the address of the embedded server that has the file open: this process's, or another one's."""
        try:
            import milvus_lite.server_manager
        except ImportError as error:  # there is none for Windows
            raise KnowledgeBaseError("Milvus Lite is not installed; pass the address of a Milvus server.") from error
        deadline = time.monotonic() + OWNER_SECONDS
        self._check_folder()
        while True:
            with _OPENING, errors_are_raised() as errors:
                address = milvus_lite.server_manager.server_manager_instance.start_and_get_uri(self._path)
                if address:
                    if not self.owns_file:
                        if not _OPEN_FILES[self._path]:  # nobody makes a collection before the file is published
                            _remove_half_made(self._path)
                        self.owns_file = True
                        _OPEN_FILES[self._path] += 1
                        self._publish(address)
                    return address
            if errors and not isinstance(errors[-1], milvus_lite.exceptions.DataDirLockedError):
                raise KnowledgeBaseError(self._why_unreadable(errors[-1])) from errors[-1]
            owner = self._published()
            if owner is not None and owner["host"] == socket.gethostname() and _answers(owner["address"]):
                return owner["address"]
            if time.monotonic() > deadline:
                raise KnowledgeBaseError(self._why_not_opened(owner))
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

    def _check_folder(self) -> None:
        """Make the folder that the file is to lie in; refuse what is there and is something else."""
        path = Path(self._path)
        if path.is_file():
            raise KnowledgeBaseError(
                f"{self.uri} is not a Milvus Lite knowledge base, which is a folder, but a file. Name another one."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and any(path.iterdir()) and not (path / "collections").is_dir():
                raise KnowledgeBaseError(
                    f"{self.uri} is not a Milvus Lite knowledge base, but a folder with other things in it. Name another one."
                )
        except OSError as error:
            raise KnowledgeBaseError(self._why_unreadable(error)) from error

    def _why_unreadable(self, error: BaseException) -> str:
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            return f"{self.uri} cannot be opened: {error.filename} is not a folder. Name another one."
        if isinstance(error, OSError):
            return f"{self.uri} cannot be opened: {error.strerror} ({error.filename}). Its folder must be there and writable."
        return f"{self.uri} could not be opened: {error}. If it is damaged, restore a copy or ingest into another file."

    def _why_not_opened(self, owner: dict[str, Any] | None) -> str:
        if owner is not None and owner["host"] != socket.gethostname():
            return (
                f"{self.uri} is in use by process {owner['process']} on {owner['host']}. A Milvus Lite file can be shared "
                "by the processes of one machine only: for several machines start a Milvus server and pass its address."
            )
        return (
            f"{self.uri} is open in another program, which does not serve it to others. Close that program, or serve the "
            "file with `python -m retrieval serve`."
        )

    def _why_no_connection(self, error: Exception) -> str:
        if getattr(error, "code", None) == DATABASE_NOT_FOUND or "database" in str(error) and "exist" in str(error):
            name = self.database or self.uri.rpartition("/")[2]
            return f"There is no database {name!r} at {self.uri}: create it, or name another one."
        if isinstance(error, FileNotFoundError):  # found when it was named, but not in the process that connects
            return f"No connection to {self.uri}: there is no TLS file {error.filename} here."
        if self.is_file or not _answers(self.uri):
            return f"No connection to {self.uri}: nothing answers there. Is the server up, and the address right?"
        return (
            f"{self.uri} answers, but does not let this program in: check the token (MILVUS_TOKEN), and whether the "
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
                self._connect_again()
            with errors_are_raised():
                return getattr(self.client, method)(*args, timeout=self.timeout, **kwargs)

        if self._closed:
            raise KnowledgeBaseError(f"{self.uri} was closed, by this object or a copy of it: open it again.")
        forked = self._process not in (0, os.getpid())
        if self._process != os.getpid():
            self._begin_here()
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
            advice = (
                " This process was forked, which gRPC does not survive while another thread uses it. Start it by 'spawn' "
                "instead (multiprocessing_context='spawn' in a DataLoader)."
            )
            raise KnowledgeBaseError(f"{error} Tried for {waited:.0f} s.{advice if forked else ''}") from error
        except FAILURES as error:
            raise KnowledgeBaseError(self._explain(method, args, error, time.monotonic() - started)) from error

    def _passes(self, error: BaseException) -> bool:
        """Return True if another attempt may succeed."""
        if isinstance(error, KnowledgeBaseError):  # no connection: a server that is being started again
            return True
        if isinstance(error, grpc.RpcError):
            return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        code = getattr(error, "code", None)
        if isinstance(code, grpc.StatusCode):  # pymilvus passes some on
            return code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        text = str(error).lower()
        if self.is_file and self.owns_file:  # Milvus Lite numbers most of its errors 1: of these, the race alone passes
            return code in NOT_LOADED or LITE_RACE in text
        return isinstance(error, MilvusException) and (code in PASSING or any(word in text for word in PASSING_WORDS))

    def _recover(self, args: tuple) -> Callable[[RetryCallState], None]:
        def before_sleep(state: RetryCallState) -> None:
            error = state.outcome.exception()
            if state.attempt_number == 3:  # some tenths of a second are no news
                logger.warning("%s is not ready (%s); trying again for %.0f s.", self.uri, _reason(error), self.timeout)
            if getattr(error, "code", None) in NOT_LOADED and args:
                try:
                    with errors_are_raised():
                        self.client.load_collection(args[0], timeout=self.timeout)
                except FAILURES as again:
                    logger.debug("Loading failed as well: %s", again)
            elif self.is_file and not self.owns_file:  # the process that served the file is gone, maybe for good
                self.client = None

        return before_sleep

    def _explain(self, method: str, args: tuple, error: Exception, seconds: float) -> str:
        code, where = getattr(error, "code", None), f"{args[0]!r} at {self.uri}" if args else self.uri
        if code == COLLECTION_NOT_FOUND:
            return f"Collection {where} is not there any more: it was dropped or renamed. Ingest it again, or import a copy."
        if code in FULL or "no space left" in str(error).lower() or "file too large" in str(error).lower():
            return (
                f"Milvus at {self.uri} has no more {FULL.get(code, 'disk space')} ({_reason(error)}). What it "
                "acknowledged is kept; make room and run the same command again."
            )
        if self._passes(error):
            return (
                f"Milvus at {self.uri} did not answer {method} for {seconds:.0f} s ({_reason(error)}). Is the server up, "
                "and its collection loaded? A longer wait can be asked for with `timeout`."
            )
        return f"Milvus refused {method} on {where}: {_reason(error)}."

    def close(self) -> None:
        """Let go. After the last one on a Milvus Lite file, another process can open the file."""
        if self._closed:
            return
        self._closed = True
        if self._process not in (0, os.getpid()):  # forked, and not used since: what is open is the parent's
            return
        if self.client is not None:
            self.client.close()
        self._release_file()

    def _release_file(self) -> None:
        with _OPENING:
            if self.owns_file:
                self.owns_file = False
                _OPEN_FILES[self._path] -= 1
                if not _OPEN_FILES[self._path]:
                    from milvus_lite.server_manager import server_manager_instance

                    self._notice.unlink(missing_ok=True)
                    server_manager_instance.release_server(self._path)


def _leave_files_to_the_parent() -> None:
    """In a forked process, forget the embedded servers: their threads run in the parent alone."""
    global _OPENING
    _OPENING = threading.RLock()  # another thread of the parent may have held it
    _OPEN_FILES.clear()
    module = sys.modules.get("milvus_lite.server_manager")
    if module is not None:
        atexit.unregister(module.server_manager_instance.release_all)
        _INHERITED.append(module.server_manager_instance)
        module.server_manager_instance = module.ServerManager()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_files_to_the_parent)


def _remove_half_made(path: str) -> None:
    """Folders of collections whose making was killed before they had a schema: to Milvus Lite, which does not remove them, there
    is no such collection, and none can be made where its folder is."""
    for pattern in ("collections/*", "databases/*/collections/*"):
        for folder in Path(path).glob(pattern):
            if folder.is_dir() and not (folder / "schema.json").exists():
                shutil.rmtree(folder)


def _reason(error: BaseException | None) -> str:
    return str(getattr(error, "message", None) or error).rstrip(".")


def _answers(uri: str) -> bool:
    """Return True if something listens there."""
    parts = urlsplit(uri)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 19530)
        with socket.create_connection((parts.hostname, port), timeout=3):
            return True
    except (OSError, ValueError, TypeError):
        return False
