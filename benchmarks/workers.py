"""Worker processes: each holds one side of a comparison and answers one task at a time.

Sides in processes of their own cannot disturb each other: memory is told apart, an error of one
leaves the others alone, and they can compile at the same time.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

Task = dict[str, Any]
Answer = dict[str, Any]  # what was measured, or "error" and the text of it


class Worker:
    """A process that runs `serve`. Tasks and answers are lines of JSON.

    Args:
        name: the side's name.
        arguments: the script and its arguments.
        log: the process's errors and messages go there. Default: this process's standard error.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: IO[str] | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        if "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._is_lost = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put({"error": f"the process ended with code {self._process.wait()}"})

    @property
    def is_lost(self) -> bool:
        """True once the process has ended, or did not answer in time."""
        return self._is_lost

    def ask(self, **task: Any) -> None:
        """Give the worker a task. The answer must be fetched before the next."""
        if self._is_lost:
            return
        assert self._process.stdin is not None
        try:
            print(json.dumps(task), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # `answer` says that the process ended

    def answer(self, deadline: float = float("inf")) -> Answer:
        """Return the answer. A worker that has none by `deadline` is ended.

        Args:
            deadline: a time of `time.monotonic`.
        """
        if self._is_lost:
            return {"error": "the process is gone"}
        try:
            left = None if deadline == float("inf") else max(deadline - time.monotonic(), 0.01)
            answer = self._answers.get(timeout=left)
        except queue.Empty:
            answer = {"error": "out of time"}
            self._is_lost = True
            self._process.kill()
        if self._process.poll() is not None:
            self._is_lost = True
        return answer

    def close(self) -> None:
        """End the process."""
        self._is_lost = True
        self._process.kill()
        self._process.wait()


def serve(handle: Callable[[Task], Answer]) -> None:
    """Answer the tasks on standard input until it ends. An error is an answer, too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=answers, flush=True)
