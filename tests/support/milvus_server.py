"""A real Milvus server for tests.

It is installed into a virtual environment of its own and listens on free loopback ports.
"""

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout
from pymilvus import MilvusClient

from .once import made_once
from .processes import free_ports

ENVIRONMENT = Path(__file__).parents[2] / ".venv-milvus"
VERSION = "2.3.5"
FIXED_PORT = 2380  # the port of the server's etcd, which cannot be chosen
# Because of that port, one server runs at a time on a machine: the holder of this lock.
TURN = Path(tempfile.gettempdir()) / f"transformers-retro-milvus-{getpass.getuser()}.lock"
COMPONENTS = [
    "proxy",
    "etcd",
    "root-coord",
    "proxy-internal",
    "query-coord",
    "query-node",
    "index-coord",
    "index-node",
    "data-coord",
    "data-node",
]


def install() -> Path:
    """Install the server unless it is there, and return its program."""

    def make(environment: Path) -> None:
        print(f"Installing Milvus {VERSION} into {environment}.", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([environment / "bin" / "pip", "install", "--quiet", f"milvus=={VERSION}"], check=True)

    return made_once(ENVIRONMENT, make) / "bin" / "milvus-server"


def wait_for_port(port: int) -> None:
    """Wait until a stopped server has released the port."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with socket.socket() as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(("127.0.0.1", port))
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"Port {port} is in use. Stop the other Milvus server (or etcd) first.") from error
            time.sleep(0.2)


class MilvusServer:
    """A server with its data in a folder. It can be stopped and started again.

    Only one runs at a time on a machine.

    Args:
        options: further options of `milvus-server`.
        client: arguments of `MilvusClient`, such as a token.
    """

    def __init__(self, folder: Path, *options: str, scheme: str = "http", **client) -> None:
        self.folder, self.client = folder, client
        ports = dict(zip(COMPONENTS, free_ports(len(COMPONENTS)), strict=True))
        self.environment = {
            **os.environ,
            "METRICS_PORT": str(free_ports(1)[0]),
            "DEPLOY_MODE": "STANDALONE",
            "MILVUS_RUN_DIR": str(folder / "run"),
            "LD_LIBRARY_PATH": str(folder / "bin"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.uri = f"{scheme}://127.0.0.1:{ports['proxy']}"
        flags = [text for name, port in ports.items() for text in (f"--{name}-port", str(port))]
        self.command = [str(install()), "--data", str(folder), *flags, *options]
        self.process: subprocess.Popen | None = None
        self.turn = FileLock(TURN)
        self.start()

    def start(self) -> None:
        """Start the server unless it runs, and return when it answers.

        Wait while another test run has a server.
        """
        if self.process is not None:
            return
        try:
            self.turn.acquire(timeout=25 * 60)
        except Timeout as error:
            raise RuntimeError(f"Another test run's Milvus server holds {TURN}. Wait for its end.") from error
        wait_for_port(FIXED_PORT)
        command = self.command
        if (self.folder / "configs" / "milvus.yaml").exists():
            # Started before: skip the wheel's launcher. It finds the port in use while connections
            # of the killed server linger, and silently listens on the next one.
            command = [str(self.folder / "bin" / "milvus"), "run", "standalone"]
        with open(self.folder.with_suffix(".log"), "ab") as log:
            # a session of its own, since the launcher starts the server as its child
            self.process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        if not self._answers(seconds=180):
            self.stop()
            log_end = self.folder.with_suffix(".log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"The Milvus server in {self.folder} does not start:\n{log_end}")

    def _answers(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                client = MilvusClient(self.uri, timeout=5, **self.client)
                client.list_collections()
                client.close()
                return True
            time.sleep(0.3)
        return False

    def stop(self) -> None:
        """Kill the server without warning, like a power cut."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        self.turn.release()
