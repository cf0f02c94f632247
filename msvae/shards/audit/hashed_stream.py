"""A file read once from front to back, and hashed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from msvae.shards.stores.store import Store

CHUNK_BYTES = 2**23
"""Large enough for the latency of an object store, small enough for one a thread."""


class HashedStream:
    """Spans of one file at growing offsets. Holds two chunks, or the span asked for where that is longer."""

    def __init__(self, store: Store, name: str, on_read: Callable[[int], None] | None = None) -> None:
        self._store, self._name, self._on_read = store, name, on_read
        self._sha256 = hashlib.sha256()
        self._held = bytearray()
        self._start = 0

    def span(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer where the file ends; nothing before `offset` can be read later."""
        assert offset >= self._start, (offset, self._start)
        self._forget(offset)
        while self._end < offset + length and self._read():
            self._forget(offset)
        return bytes(memoryview(self._held)[offset - self._start :][:length]) if offset < self._end else b""

    def sha256(self) -> str:
        """Of the whole file, the rest of which is read now."""
        while self._read():
            self._forget(self._end)
        return self._sha256.hexdigest()

    @property
    def _end(self) -> int:
        return self._start + len(self._held)

    def _read(self) -> bool:
        chunk = self._store.read_span(self._name, self._end, CHUNK_BYTES)
        self._sha256.update(chunk)
        self._held += chunk
        if self._on_read is not None:
            self._on_read(len(chunk))
        return bool(chunk)

    def _forget(self, offset: int) -> None:
        forgotten = min(offset, self._end) - self._start
        del self._held[:forgotten]
        self._start += forgotten
