"""MilvusSession: a connection that is opened again when it breaks, and calls that are retried."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pymilvus import MilvusClient
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from .addresses import MilvusAddress, no_file
from .errors import KnowledgeBaseError
from .failures import FAILURES, NOT_LOADED, explain, explain_connection, is_transient, reason
from .lite_file import LiteFile, keep_inherited, opening
from .quiet import errors_are_raised

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_SECONDS = 10.0  # the most that one attempt to connect may take
# pymilvus sends a ping every 10 seconds. The server inside Milvus Lite permits one in 5 minutes and
# hangs up on clients that send more ("too_many_pings"). It is on this machine, where a lost
# connection shows by itself.
NO_PINGS = {"grpc.keepalive_time_ms": 2**31 - 1}


class MilvusSession:
    """A session with Milvus that reconnects when it breaks and retries failed calls.

    While Milvus is unavailable, a call is retried for the address's `timeout` seconds. Retrying is
    safe: a row's key follows from its document and place, so writing it twice changes nothing.

    Several processes of a machine can use one Milvus Lite file; see [`LiteFile`].

    Copies share the connection. After pickling or a fork, the other process opens its own
    connection on first use. A pickle holds no access token; the other process reads MILVUS_TOKEN.

    Args:
        address: a URI or path as for [`MilvusAddress`], or the address itself. Default: MILVUS_URI.

    Attributes:
        client: the underlying `MilvusClient`; None until connected.
        serving: the address that answers; for a file it is on the loopback interface.

    Raises:
        KnowledgeBaseError (by the constructor): the file cannot be opened, nothing answers at the
            address, or the server does not let this program in.
        KnowledgeBaseError (by every call): Milvus refused it, or did not answer in time.
    """

    def __init__(self, address: str | os.PathLike[str] | MilvusAddress | None = None) -> None:
        self.address = MilvusAddress.of(address)
        self._closed = False
        self._begin()
        try:
            self._connect()
        except BaseException:
            self.close()  # otherwise the file would stay open without an owner
            raise

    def _begin(self) -> None:
        """Start without a connection."""
        self.client: MilvusClient | None = None
        self._file = None if self.address.path is None else LiteFile(self.uri, self.address.path)
        self.serving = ""
        self._version = ""
        self._process = 0  # the process that is connected

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "_closed": self._closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.address, self._closed = state["address"], state["_closed"]
        self._begin()

    def __copy__(self) -> "MilvusSession":
        return self

    def __deepcopy__(self, memo: dict) -> "MilvusSession":
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri})"

    @property
    def uri(self) -> str:
        """The address without user and password."""
        return str(self.address.uri)

    @property
    def timeout(self) -> float:
        """Seconds that a call keeps trying."""
        return self.address.timeout

    @property
    def is_file(self) -> bool:
        """True for a Milvus Lite file, False for the address of a server."""
        return self.address.is_file

    @property
    def owns_file(self) -> bool:
        """True if this process opened the Milvus Lite file and serves it to others."""
        return self._file is not None and self._file.is_owned

    @property
    def version(self) -> tuple[int, ...]:
        """(major, minor) of the server, or of Milvus Lite."""
        text = self._version.removeprefix("milvus_lite-").removeprefix("v")
        return tuple(int(part) for part in text.split(".")[:2])

    @property
    def is_lite(self) -> bool:
        """True if Milvus Lite answers, also for a file that another process serves over http://."""
        return self.is_file or "milvus_lite" in self._version

    def _connect(self) -> None:
        options = self.address.options()
        self.serving = self.uri if self._file is None else self._file.serve_or_find()
        seconds = min(self.timeout, CONNECT_SECONDS)

        def connect(**more: Any) -> MilvusClient:
            # dedicated: otherwise pymilvus reuses a connection to this address, even one with other
            # certificates
            return MilvusClient(self.serving, timeout=seconds, dedicated=True, **options, **more)

        client = None
        try:
            with errors_are_raised():
                client = connect(**({"grpc_options": NO_PINGS} if self.is_file else {}))
                self._version = client.get_server_version(timeout=seconds)
                if not self.is_file and self.is_lite:  # a file that another process serves
                    client.close()
                    client = connect(grpc_options=NO_PINGS)
                client.list_collections(timeout=seconds)  # the first call that looks for the database
        except (*FAILURES, OSError, ValueError) as error:
            if client is not None:
                client.close()
            raise explain_connection(self.address, error) from error
        self.client, self._process = client, os.getpid()

    def _begin_here(self) -> None:
        """Start without a connection in a process that unpickled or inherited this object.

        Raises:
            KnowledgeBaseError: the file or the token is missing, so that no attempt could connect.
        """
        with opening():
            if self._process == os.getpid():
                return
            if self.client is not None:
                keep_inherited(self.client)
            self._begin()
            if self.address.path is not None and not os.path.exists(self.address.path):
                raise KnowledgeBaseError(no_file(self.address.path))
            self.address.secret()

    def _connected(self) -> MilvusClient:
        """Return the client; connect first if there is none and no other thread has done so."""
        with opening():
            if self.client is None:
                try:
                    self._connect()
                except BaseException:
                    if self._file is not None:
                        self._file.release()
                    raise
            client = self.client
        if client is None:
            raise KnowledgeBaseError(f"There is no connection to {self.uri}.")
        return client

    def _call(self, method: str, collection: str | None, call: Callable[[MilvusClient], T]) -> T:
        """Make a call, and retry it while Milvus is unavailable.

        Args:
            method: the call's name, for messages.
            collection: the collection that it uses; None if it uses none.
        """

        def attempt() -> T:
            client = self.client or self._connected()
            with errors_are_raised():
                return call(client)

        if self._closed:
            raise KnowledgeBaseError(f"{self.uri} was closed, by this object or a copy of it: open it again.")
        forked = self._process not in (0, os.getpid())
        if self._process != os.getpid():
            self._begin_here()
        started = time.monotonic()
        retrying = Retrying(
            retry=retry_if_exception(self._is_transient),
            stop=stop_after_delay(self.timeout),
            wait=wait_exponential(multiplier=0.1, max=5),
            before_sleep=lambda state: self._recover(state, collection),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except KnowledgeBaseError as error:
            waited = time.monotonic() - started
            advice = (
                " This process was forked, and gRPC breaks if another thread uses it during a fork. Start the process "
                "with 'spawn' instead (multiprocessing_context='spawn' in a DataLoader)."
            )
            raise KnowledgeBaseError(f"{error} Tried for {waited:.0f} s.{advice if forked else ''}") from error
        except FAILURES as error:
            seconds, transient = time.monotonic() - started, self._is_transient(error)
            raise explain(method, collection, self.uri, error, transient=transient, seconds=seconds) from error

    def _is_transient(self, error: BaseException) -> bool:
        return is_transient(error, owns_file=self.owns_file)

    def _recover(self, state: RetryCallState, collection: str | None) -> None:
        """Before the next attempt, load the collection or look for the file's next owner."""
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number == 3:  # a few tenths of a second are not worth a line
            logger.warning("%s is not ready (%s); trying again for %.0f s.", self.uri, reason(error), self.timeout)
        if self.client is not None and collection is not None and getattr(error, "code", None) in NOT_LOADED:
            try:
                with errors_are_raised():
                    self.client.load_collection(collection, timeout=self.timeout)
            except FAILURES as again:
                logger.debug("Loading failed as well: %s", again)
        elif self.is_file and not self.owns_file:  # the process that served the file is gone, maybe for good
            self.client = None

    def close(self) -> None:
        """Close the connection.

        After this process's last one to a Milvus Lite file, another process can open the file.
        """
        if self._closed:
            return
        self._closed = True
        if self._process not in (0, os.getpid()):  # forked, and not used since: what is open is the parent's
            return
        if self.client is not None:
            self.client.close()
        if self._file is not None:
            self._file.release()
