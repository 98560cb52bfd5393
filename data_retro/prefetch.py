"""Prefetcher: a thread makes the next batches, with their neighbors, while the model computes."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()
SECONDS_PER_TRY = 0.1  # after which the thread checks whether it was stopped


class Prefetcher(Generic[T]):
    """Iterate over the items of another iterator, which a thread reads ahead.

    The caller itself reads the first item. An iterator may communicate at its beginning, for
    example to agree on a seed with other processes, which must not happen beside the caller's own
    messages.

    Args:
        items: the iterator; nobody else may read it.
        depth: items that may be ready and waiting, at least 1.

    Attributes:
        seconds_waited: seconds that the caller has waited for items.

    Raises (from `next`):
        Exception: the exception that reading an item raised, with its own traceback. Then the
            iteration is over.
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
                first = next(self._items)
            except BaseException:
                self._over = True
                raise
            self.seconds_waited += time.perf_counter() - started
            self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
            self._thread.start()
            return first
        item, error = self._ready.get()
        self.seconds_waited += time.perf_counter() - started
        if error is not None or item is _END:
            self._over = True
            raise StopIteration if error is None else error
        return item

    def _read(self) -> None:
        """Read items until the end, an error, or `close`; runs in the thread."""
        item: T | object | None = None
        error: BaseException | None = None
        while not self._stopped.is_set() and item is not _END and error is None:
            try:
                item = next(self._items, _END)
            except BaseException as raised:
                error = raised
            while not self._stopped.is_set():
                try:
                    self._ready.put((item, error), timeout=SECONDS_PER_TRY)
                    break
                except queue.Full:
                    pass

    def close(self) -> None:
        """Stop reading and drop the items that wait.

        Returns when the item that is being read is finished.
        """
        self._over = True
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
