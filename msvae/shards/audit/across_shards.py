"""Work on many shards: threads with results in order, progress in bytes, and keys that must be unique in a split."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from msvae.messages import OnProgress

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def in_order(function: Callable[[ItemT], ResultT], items: Iterable[ItemT], num_threads: int) -> Iterator[ResultT]:
    """Yield `function(item)` of each item, in order.

    Only `2 * num_threads + 1` items are in flight, so memory does not grow with the number of items.
    """
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
    """Sum of the bytes that several threads have read, reported after each read."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._done, self._total, self._report = 0, total, on_progress
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """Add the bytes of one read."""
        if self._report is None:
            return
        with self._lock:
            self._done += num_bytes
            self._report(self._done, self._total)


class KeyRegister:
    """The keys of all shards as 64-bit hashes, eight bytes per key. Keys are compared only if hashes are equal."""

    def __init__(self) -> None:
        self._hashes: list[NDArray[np.uint64]] = []
        self._shards: list[int] = []

    def add(self, shard: int, keys: Iterable[str]) -> None:
        """Add the keys of one shard."""
        digests = (hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest() for key in keys)
        self._hashes.append(np.frombuffer(b"".join(digests), np.uint64))
        self._shards.append(shard)

    def repeated(self, keys_of: Callable[[int], Iterable[str]]) -> Iterator[tuple[str, list[int]]]:
        """Yield each key that occurs more than once, with its shards. `keys_of(shard)` must return the keys again."""
        if not self._hashes:
            return
        hashes = np.concatenate(self._hashes)
        values, counts = np.unique(hashes, return_counts=True)
        suspects = values[counts > 1]
        if not len(suspects):
            return
        shards_of: dict[str, list[int]] = {}
        for shard, own in zip(self._shards, self._hashes, strict=True):
            if np.isin(own, suspects).any():
                for key in keys_of(shard):
                    shards_of.setdefault(key, []).append(shard)
        yield from ((key, shards) for key, shards in shards_of.items() if len(shards) > 1)
