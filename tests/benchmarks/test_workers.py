"""Workers answer one task at a time; errors, noise and silence of one do not stop a benchmark."""

import time
from pathlib import Path

import pytest
from workers import Turns, Worker

SCRIPT = """
import sys, time
sys.path.append({folder!r})
from workers import serve

def handle(task):
    print("a library's message")
    if task["what"] == "hang":
        time.sleep(60)
    if task["what"] == "end":
        sys.exit(3)
    return {{"doubled": 2 * task["what"]}}

serve(lambda: handle)
"""


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "side.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parents[2] / "benchmarks")))
    started = []

    def start():
        with (tmp_path / "log").open("a") as log:
            started.append(Worker("side", [str(script)], log))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


def ask(worker, what, seconds=30.0):
    worker.ask(what=what)
    return worker.answer(time.monotonic() + seconds)


def test_an_error_is_an_answer_and_messages_are_not(start, tmp_path):
    worker = start()
    assert ask(worker, 21) == {"doubled": 42}
    assert ask(worker, None)["error"].startswith("TypeError: ")
    assert ask(worker, 2) == {"doubled": 4}
    assert "a library's message" in (tmp_path / "log").read_text()


def test_a_worker_that_ends_or_is_silent_is_lost(start):
    ended, silent = start(), start()
    assert "ended with code 3" in ask(ended, "end")["error"]
    assert ask(silent, "hang", seconds=1) == {"error": "out of time"}
    for worker in (ended, silent):
        assert worker.is_lost
        assert "error" in ask(worker, 1)


def test_turns_end_in_time_and_leave_out_a_side_that_failed(start):
    workers = {"good": start(), "bad": start()}
    turns = Turns(workers, time.monotonic() + 30, time.monotonic() + 30)
    workers["bad"].ask(what="end")
    workers["bad"].answer()
    turns.prepare([{"what": 1}])
    turns.measure([{"what": 1}, {"what": 2}], rounds=2)
    assert turns.answers["good", (1,)] == [{"doubled": 2}] * 2
    assert [*turns.answers["bad", (1,)][0]] == ["error"] and len(turns.answers["bad", (1,)]) == 1
    turns.end = time.monotonic()
    turns.measure([{"what": 3}], rounds=2)
    assert ("good", (3,)) not in turns.answers
    assert turns.drop_errors("gone") and not turns.drop_errors("gone")
    assert {side for side, _ in turns.answers} == {"good"}
