"""A Milvus Lite file that several processes share: one opens it and serves it to the others."""

import atexit
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .addresses import answers
from .errors import KnowledgeBaseError
from .quiet import errors_are_raised

OWNER_SECONDS = 5.0  # to wait for the address that a file's owner publishes
# A process has one embedded server a file for all its connections, which are counted here.
_open_files: Counter[str] = Counter()
_opening: AbstractContextManager[bool] = threading.RLock()
_inherited: list[Any] = []  # the parent process's objects, which a forked one must not shut down


def opening() -> AbstractContextManager[bool]:
    """Return this process's lock around opening and closing connections."""
    return _opening


class LiteFile:
    """A Milvus Lite file, opened by this process or served by another one.

    The process that opens the file publishes its address in a small file beside it. When that
    process ends, another one that needs the file opens it.

    Args:
        uri: the file as the user named it, for messages.
        path: its absolute path.

    Attributes:
        is_owned: this process opened the file.
    """

    def __init__(self, uri: str, path: str) -> None:
        self.uri, self.path = uri, path
        self.is_owned = False

    @property
    def notice(self) -> Path:
        """The file beside it that says which process serves it, and at which address."""
        return Path(self.path + ".served")

    def serve_or_find(self) -> str:
        """Return the address of the server that has the file open, this process's or another one's.

        Raises:
            KnowledgeBaseError: the file cannot be opened; says why and what to do.
        """
        try:
            import milvus_lite.server_manager
        except ImportError as error:  # there is none for Windows
            raise KnowledgeBaseError("Milvus Lite is not installed; pass the address of a Milvus server.") from error
        deadline = time.monotonic() + OWNER_SECONDS
        self._check_folder()
        while True:
            with _opening, errors_are_raised() as errors:
                address = milvus_lite.server_manager.server_manager_instance.start_and_get_uri(self.path)
                if address:
                    self._take(address)
                    return address
            if errors and not isinstance(errors[-1], milvus_lite.exceptions.DataDirLockedError):
                raise KnowledgeBaseError(self._why_unreadable(errors[-1])) from errors[-1]
            owner = self.owner()
            if owner is not None and owner["host"] == socket.gethostname() and answers(owner["address"]):
                return owner["address"]
            if time.monotonic() > deadline:
                raise KnowledgeBaseError(self._why_not_opened(owner))
            time.sleep(0.1)

    def _take(self, address: str) -> None:
        if self.is_owned:
            return
        if not _open_files[self.path]:  # nobody makes a collection before the address is published
            _remove_half_made(self.path)
        self.is_owned = True
        _open_files[self.path] += 1
        notice = {"address": address, "host": socket.gethostname(), "process": os.getpid()}
        draft = Path(f"{self.path}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(notice))
        draft.replace(self.notice)

    def owner(self) -> dict[str, Any] | None:
        """Return the address, host and process that serve the file, as published beside it."""
        try:
            return json.loads(self.notice.read_text())
        except (OSError, ValueError):
            return None

    def release(self) -> None:
        """Release the file; after this process's last connection to it, another one can open it."""
        with _opening:
            if self.is_owned:
                self.is_owned = False
                _open_files[self.path] -= 1
                if not _open_files[self.path]:
                    from milvus_lite.server_manager import server_manager_instance

                    self.notice.unlink(missing_ok=True)
                    server_manager_instance.release_server(self.path)

    def _check_folder(self) -> None:
        """Make the folder that the file lies in; refuse something else that is at its place."""
        path = Path(self.path)
        if path.is_file():
            raise KnowledgeBaseError(
                f"{self.uri} is not a Milvus Lite knowledge base, which is a folder, but a file. Name another one."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and any(path.iterdir()) and not (path / "collections").is_dir():
                raise KnowledgeBaseError(
                    f"{self.uri} is not a Milvus Lite knowledge base, but a folder with other things in it. "
                    "Name another one."
                )
        except OSError as error:
            raise KnowledgeBaseError(self._why_unreadable(error)) from error

    def _why_unreadable(self, error: BaseException) -> str:
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            return f"{self.uri} cannot be opened: {error.filename} is not a folder. Name another one."
        if isinstance(error, OSError):
            why = f"{error.strerror} ({error.filename})"
            return f"{self.uri} cannot be opened: {why}. Its folder must be there and writable."
        return f"{self.uri} could not be opened: {error}. If it is damaged, restore a copy or ingest into another file."

    def _why_not_opened(self, owner: dict[str, Any] | None) -> str:
        if owner is not None and owner["host"] != socket.gethostname():
            return (
                f"{self.uri} is in use by process {owner['process']} on {owner['host']}. A Milvus Lite file can be "
                "shared by the processes of one machine only: for several machines start a Milvus server and pass its "
                "address."
            )
        return (
            f"{self.uri} is open in another program, which does not serve it to others. Close that program, or serve "
            "the file with `python -m retrieval serve`."
        )


def keep_inherited(client: Any) -> None:
    """Keep an object of the parent process alive in a forked one, so that nothing shuts it down."""
    _inherited.append(client)


def _remove_half_made(path: str) -> None:
    """Remove the folders of collections whose creation was killed before they had a schema.

    To Milvus Lite there is no such collection, and none can be made where its folder is.
    """
    for pattern in ("collections/*", "databases/*/collections/*"):
        for folder in Path(path).glob(pattern):
            if folder.is_dir() and not (folder / "schema.json").exists():
                shutil.rmtree(folder)


def _leave_files_to_the_parent() -> None:
    """Forget the embedded servers in a forked process: their threads run in the parent alone."""
    global _opening
    _opening = threading.RLock()  # another thread of the parent may have held it
    _open_files.clear()
    module: Any = sys.modules.get("milvus_lite.server_manager")
    if module is not None:
        atexit.unregister(module.server_manager_instance.release_all)
        _inherited.append(module.server_manager_instance)
        module.server_manager_instance = module.ServerManager()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_files_to_the_parent)
