"""A prefetcher keeps the order of items, reads a bounded number ahead, and ends cleanly."""

import threading
import time

import pytest

from data_retro.prefetch import Prefetcher


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_the_same_order():
    assert list(Prefetcher(iter(range(100)), depth=3)) == list(range(100))
    assert list(Prefetcher(iter([]))) == []
    assert not prefetching()


def test_at_most_depth_items_wait():
    made, full = [], threading.Event()

    def items():
        for i in range(100):
            made.append(i)
            if len(made) == 1 + 3 + 1:  # one given out, three ready, one that waits in the thread
                full.set()
            yield i

    ahead = Prefetcher(items(), depth=3)
    assert next(ahead) == 0
    assert full.wait(600)
    time.sleep(0.1)  # time to make more, which it must not
    assert len(made) == 5
    ahead.close()
    assert not prefetching() and len(made) < 10


def test_an_error_comes_in_its_place_and_with_its_cause():
    def items():
        yield 1
        yield 2
        try:
            raise KeyError("cause")
        except KeyError as error:
            raise RuntimeError("the search failed") from error

    ahead = Prefetcher(items(), depth=5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(RuntimeError, match="the search failed") as caught:
        next(ahead)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(StopIteration):
        next(ahead)


def test_closing_while_an_item_is_made_waits_for_it():
    entered, leave = threading.Event(), threading.Event()

    def items():
        yield 0
        entered.set()
        leave.wait(600)
        yield 1

    ahead = Prefetcher(items())
    next(ahead)
    assert entered.wait(600)
    threading.Timer(0.2, leave.set).start()
    ahead.close()
    assert leave.is_set() and not prefetching()
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_depth_of_0_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Prefetcher(iter([]), depth=0)
