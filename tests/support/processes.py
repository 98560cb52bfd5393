"""Processes that start quickly: forked from one that has imported the libraries.

Use them where a test kills a process, or runs several at once. To test the start of a program, or
one that reads its environment while it imports, use `subprocess`.
"""

import atexit
import contextlib
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preloaded"])
# Read once, while libraries are imported. Without MKL_CBWR, MKL's results depend on the memory's
# layout.
_AT_IMPORT = {"MKL_CBWR": "COMPATIBLE", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
# Starts a program in two processes, which communicate over gloo.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--main_process_port", "0"]  # any free port


def free_ports(count: int) -> list[int]:
    """Return free ports below the range from which systems take ports for outgoing connections."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(ports) < count:
            port = random.SystemRandom().randrange(10_000, 32_768)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def _run(log: Path, environment: dict[str, str], target: Callable, arguments: tuple) -> None:
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    sys.argv[1:] = map(str, arguments)
    try:
        target(*arguments)
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # multiprocessing skips them


class Forked:
    """A process that calls a function; all that it prints goes to a file."""

    def __init__(self, log: Path, target: Callable, *arguments, **environment: str) -> None:
        self.log = log
        log.touch()
        with mock.patch.dict(os.environ, _AT_IMPORT):
            forkserver.ensure_running()
        self.process = _CONTEXT.Process(target=_run, args=(log, environment, target, arguments))
        self.process.start()

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def wait_for_output(self, text: str) -> None:
        """Return when the process has printed the text."""
        while text not in self.output:
            assert self.is_alive() or text in self.output, self.output[-3000:]
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, seconds: float = 600) -> int:
        """Wait for the end and return the exit status; a process that hangs fails the test."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"It did not end within {seconds} s:\n{self.output[-3000:]}"
        return self.process.exitcode


def ranks(folder: Path, count: int, target: Callable, *arguments) -> list[Forked]:
    """Start the processes of one run, as `torchrun` does, with a log of each in a folder."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count)}
    return [
        Forked(folder / f"rank{rank}.log", target, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]
