"""Worker processes: each holds one side of a comparison and answers one task at a time.

Sides in processes of their own cannot disturb each other: memory is told apart, an error of one
leaves the others alone, and they can compile at the same time.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
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
        with contextlib.suppress(BrokenPipeError):  # `answer` says that the process ended
            print(json.dumps(task), file=self._process.stdin, flush=True)

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


class Turns:
    """Workers that take turns, and what they answered.

    Attributes:
        workers: by side.
        end: no measurement begins after this time (of `time.monotonic`).
        limit: a worker that has not answered by this time is ended.
        answers: by side and the task's values, the answers of measured rounds. After an error there
            are no more.
    """

    def __init__(self, workers: Mapping[str, Worker], end: float, limit: float) -> None:
        self.workers, self.end, self.limit = workers, end, limit
        self.answers: dict[tuple[str, tuple], list[Answer]] = {}

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Let all workers do the tasks at the same time, unmeasured: start, compile, warm up."""
        for task in tasks:
            for worker in self.workers.values():
                worker.ask(**task)
            for side, worker in self.workers.items():
                answer = worker.answer(self.limit)
                if "error" in answer:
                    self.answers[side, tuple(task.values())] = [answer]

    def measure(self, tasks: Sequence[Task], rounds: int) -> None:
        """Let the workers do the tasks one after the other, as often as there is time."""
        for _ in range(rounds):
            for task in tasks:
                for side, worker in self.workers.items():
                    if time.monotonic() > self.end:
                        return
                    found = self.answers.setdefault((side, tuple(task.values())), [])
                    if not (found and "error" in found[-1]):
                        worker.ask(**task)
                        found.append(worker.answer(self.limit))

    def drop_errors(self, text: str) -> bool:
        """Forget the tasks that failed with such an error; return True if there are any."""
        failed = [key for key, found in self.answers.items() if text in found[-1].get("error", "")]
        for key in failed:
            del self.answers[key]
        return bool(failed)

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers.values():
            worker.close()


def serve(build: Callable[[], Callable[[Task], Answer]]) -> None:
    """Answer the tasks on standard input until it ends. An error is an answer, too.

    Args:
        build: returns what does a task. It is called again for the next task if it fails.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    handle = None
    for line in sys.stdin:
        try:
            handle = handle or build()
            answer = handle(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=answers, flush=True)
