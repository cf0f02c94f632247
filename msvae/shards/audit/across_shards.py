"""Work on many shards at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from msvae.messages import OnProgress

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
"""Gets how much is done, and how much there is."""


def in_order(function: Callable[[ItemT], ResultT], items: Iterable[ItemT], num_threads: int) -> Iterator[ResultT]:
    """`function(item)` of each item, in order; only a few are begun ahead, so a million items cost no memory."""
    pending: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(num_threads, "msvae-shards") as threads:
        try:
            for item in items:
                pending.append(threads.submit(function, item))
                if len(pending) > 2 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for unread in pending:
                unread.cancel()


class ByteProgress:
    """Counts the bytes that several threads have read."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._done, self._total, self._report = 0, total, on_progress
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """These many more."""
        if self._report is None:
            return
        with self._lock:
            self._done += num_bytes
            self._report(self._done, self._total)
