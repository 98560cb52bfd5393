"""Prefetcher: the next batches are made, neighbors and all, while the model computes."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


class Prefetcher(Generic[T]):
    """An iterator over the items of another one, which a thread reads ahead: at most `depth` of them wait.

    The first item is read by the caller itself, as what an iterator does at its beginning (agreeing with other processes on
    a seed, say) must not run beside the caller's own communication.

    Args:
        items: read by nobody else from now on.
        depth: items ready and waiting, at least 1.

    Attributes:
        seconds_waited: that the caller has waited for items.

    Raises (from `next`):
        Exception: what reading an item raised, with its own traceback; then it is over.
    """

    def __init__(self, items: Iterator[T], depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"A prefetcher holds at least 1 item, not {depth}.")
        self.seconds_waited = 0.0
        self._items = items
        self._ready: queue.Queue = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._over = False

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        started = time.perf_counter()
        if self._thread is None:
            try:
                item = next(self._items)
            except BaseException:
                self._over = True
                raise
            self.seconds_waited += time.perf_counter() - started
            self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
            self._thread.start()
            return item
        item, error = self._ready.get()
        self.seconds_waited += time.perf_counter() - started
        if error is not None or item is _END:
            self._over = True
            raise StopIteration if error is None else error
        return item

    def _read(self) -> None:
        item, error = None, None
        while not self._stopped.is_set() and item is not _END and error is None:
            try:
                item = next(self._items, _END)
            except BaseException as raised:
                error = raised
            while not self._stopped.is_set():
                try:
                    self._ready.put((item, error), timeout=0.1)
                    break
                except queue.Full:
                    pass

    def close(self) -> None:
        """Stop reading; returns when the item that is being read is finished. What waits is dropped."""
        self._over = True
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
