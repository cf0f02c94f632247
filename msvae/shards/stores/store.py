"""The interface of every store: a flat set of named files that are only read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class FileError(ValueError):
    """A whole file cannot be used: it is missing, access is denied, it cannot be reached, or its size is wrong."""


class MissingError(FileError):
    """A file does not exist."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is missing; restore it from its source or pack this split again")


class Store(Protocol):
    """A flat set of named files. Several threads may use it at once.

    All methods raise MissingError if the file does not exist, FileError if a server does not deliver it, and
    ValueError for any other read error.
    """

    location: str
    """Folder or URL, for messages."""
    parallel_reads: int
    """Number of reads that should run at once for best throughput."""

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """Return a whole small file. Raises: FileError if it has more than `max_bytes`."""

    def size_bytes(self, name: str) -> int:
        """Return the size of a file."""

    def read_into(
        self, name: str, offset: int, buffers: Sequence[memoryview], expected_bytes: int | None = None
    ) -> int:
        """Fill the buffers one after the other from `offset` on.

        Returns: the number of bytes read, which is less than the buffers hold only if the file ends.
        Raises: FileError if the size of the whole file is not `expected_bytes`.
        """

    def read_span(self, name: str, offset: int, length: int) -> bytes:
        """Return part of a file, with fewer than `length` bytes if the file ends."""

    def names(self) -> list[str]:
        """Return the sorted names of all files directly in this location."""

    def path(self, name: str) -> str:
        """Return the name with the location in front."""


def check_size(path: str, found_bytes: int, expected_bytes: int) -> None:
    """Check the size of a shard against the manifest.

    Raises: FileError if they differ.
    """
    if found_bytes != expected_bytes:
        raise FileError(
            f"shard {path} has {found_bytes} bytes, the manifest expects {expected_bytes}: it was truncated or "
            "replaced; restore it from its source or pack this split again"
        )


def check_small(path: str, found_bytes: int, max_bytes: int | None) -> None:
    """Check that a file is small enough to be read into memory.

    Raises: FileError if it has more than `max_bytes`.
    """
    if max_bytes is not None and found_bytes > max_bytes:
        raise FileError(f"{path} has {found_bytes} bytes, expected at most {max_bytes}; pack this split again")
