"""Bytes that were read from afar once, kept on a local disk up to a bound. Shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from msvae.config import DataConfig
from msvae.shards.manifest import ShardEntry

CHECK_EVERY_BYTES = 2**24
"""A process looks at the size of the cache after it has written this much, or a 64th of the bound if that is less."""
PROCESSES_AT_ONCE = 8
"""So many may write between two looks without breaking the bound."""
COPIES = "[0-9a-f]" * 32 + ".spans"
"""Names of copies. What else lies in the folder is somebody else's."""


class SpanCache:
    """Sparse copies of shards: what was read lies at its own offset, the rest is a hole.

    Nothing says which bytes are there: a reader checks the checksum of what it got. So processes need no locks, and a
    killed write does no harm. A copy is named by the digest of the shard's index, so a changed shard has another one.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._check_every_bytes = min(CHECK_EVERY_BYTES, max_bytes // 64)
        self._kept_bytes = max_bytes - PROCESSES_AT_ONCE * self._check_every_bytes
        self._unchecked_bytes = self._check_every_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the cache {folder} ({error.strerror}); choose another folder") from error

    def read_into(self, entry: ShardEntry, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with what is there, or leave them as they are."""
        try:
            descriptor = os.open(self._path(entry), os.O_RDONLY)
        except OSError:
            return
        try:
            os.preadv(descriptor, list(buffers), offset)
        except OSError:
            return
        finally:
            os.close(descriptor)

    def write(self, entry: ShardEntry, offset: int, buffers: Sequence[memoryview]) -> None:
        """Keep these bytes. When the disk is full, nothing is kept and a warning says so once."""
        try:
            descriptor = os.open(self._path(entry), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwritev(descriptor, list(buffers), offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            warnings.warn(
                f"the cache {self._folder} takes no more ({error.strerror}); the rest is read from afar each time",
                stacklevel=2,
            )
            return
        self._unchecked_bytes += sum(len(buffer) for buffer in buffers)
        if self._unchecked_bytes >= self._check_every_bytes:
            self._unchecked_bytes = 0
            self._evict()

    def _evict(self) -> None:
        """Remove whole copies, the least recently written first, until the rest fits."""
        copies = []
        for path in self._folder.glob(COPIES):
            with suppress(OSError):  # another process removed it
                status = path.stat()
                copies.append((status.st_mtime_ns, status.st_blocks * 512, path))
        used_bytes = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if used_bytes <= self._kept_bytes:
                return
            with suppress(OSError):  # another user's
                path.unlink(missing_ok=True)
                used_bytes -= size

    def _path(self, entry: ShardEntry) -> Path:
        # a member name from a manifest is never part of a path
        name = hashlib.sha256(f"{entry.name}\n{entry.index_sha256}".encode()).hexdigest()
        return self._folder / f"{name[:32]}.spans"


def cache_for(data: DataConfig) -> SpanCache | None:
    """The cache that `data.cache` and `data.cache_gb` describe, or None."""
    return None if data.cache is None else SpanCache(Path(data.cache), int(data.cache_gb * 1e9))
