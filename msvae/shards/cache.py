"""A bounded cache of remote shards on a local disk, shared by all processes of a machine."""

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
"""A process checks the size of the cache after it has written this many bytes, or 1/64 of the limit if smaller."""
PROCESSES_AT_ONCE = 8
"""Number of processes that may write between two checks without exceeding the limit."""
COPIES = "[0-9a-f]" * 32 + ".spans"
"""Pattern of the names of cached copies. Other files in the folder are never removed."""


class SpanCache:
    """Sparse copies of shards. Bytes that were read are stored at their own offset; the rest of a copy is a hole.

    The cache does not record which bytes are present; a reader verifies the checksum of its bytes. Processes
    therefore need no locks, and a killed write does no harm. The name of a copy depends on the digest of the shard's
    index, so a changed shard gets a new copy.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._check_every_bytes = min(CHECK_EVERY_BYTES, max_bytes // 64)
        self._kept_bytes = max_bytes - PROCESSES_AT_ONCE * self._check_every_bytes
        self._unchecked_bytes = self._check_every_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot create the cache {folder} ({error.strerror}); choose another folder") from error

    def read_into(self, entry: ShardEntry, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with the cached bytes, or leave them unchanged if the shard has no copy."""
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
        """Store bytes of a shard. If the disk is full, nothing is stored, and one warning is issued."""
        try:
            descriptor = os.open(self._path(entry), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwritev(descriptor, list(buffers), offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            warnings.warn(
                f"the cache {self._folder} cannot be written ({error.strerror}); "
                "bytes that it lacks are read from the store each time",
                stacklevel=2,
            )
            return
        self._unchecked_bytes += sum(len(buffer) for buffer in buffers)
        if self._unchecked_bytes >= self._check_every_bytes:
            self._unchecked_bytes = 0
            self._evict()

    def _evict(self) -> None:
        """Remove whole copies, least recently written first, until the rest is within the limit."""
        copies = []
        for path in self._folder.glob(COPIES):
            with suppress(OSError):  # another process removed it
                status = path.stat()
                copies.append((status.st_mtime_ns, status.st_blocks * 512, path))
        used_bytes = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if used_bytes <= self._kept_bytes:
                return
            with suppress(OSError):  # the copy belongs to another user
                path.unlink(missing_ok=True)
                used_bytes -= size

    def _path(self, entry: ShardEntry) -> Path:
        # names in a manifest must not become part of a local path
        name = hashlib.sha256(f"{entry.name}\n{entry.index_sha256}".encode()).hexdigest()
        return self._folder / f"{name[:32]}.spans"


def cache_for(data: DataConfig) -> SpanCache | None:
    """Return the cache of `data.cache` and `data.cache_gb`, or None if `data.cache` is not set."""
    return None if data.cache is None else SpanCache(Path(data.cache), int(data.cache_gb * 1e9))
