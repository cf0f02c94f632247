"""What every place of shards can do: a flat set of named files that are only read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class FileError(ValueError):
    """A file that is no use as a whole: not there, refused, out of reach, or not what it should be."""


class MissingError(FileError):
    """A file that is not there."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is missing; restore it from its source or pack this split again")


class Store(Protocol):
    """A flat set of named files. Safe to use from several threads at once.

    All methods raise MissingError for a file that is not there, FileError for one that a server does not give, and
    ValueError for what cannot be read.
    """

    location: str
    """Folder or URL, for messages."""
    parallel_reads: int
    """How many reads at once pay."""

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """A whole small file; FileError where it has more than `max_bytes`."""

    def size_bytes(self, name: str) -> int:
        """Size of a file."""

    def read_into(
        self, name: str, offset: int, buffers: Sequence[memoryview], expected_bytes: int | None = None
    ) -> int:
        """Fill the buffers one after the other; fewer bytes than they hold only where the file ends.

        FileError where the whole file has not `expected_bytes`.
        """

    def read_span(self, name: str, offset: int, length: int) -> bytes:
        """Part of a file; fewer bytes than asked where it ends."""

    def names(self) -> list[str]:
        """Files directly inside, sorted."""

    def path(self, name: str) -> str:
        """The name with the location before it."""


def check_size(path: str, found_bytes: int, expected_bytes: int) -> None:
    """Raises: FileError when a shard has not the size that the manifest states."""
    if found_bytes != expected_bytes:
        raise FileError(
            f"shard {path} has {found_bytes} bytes, the manifest expects {expected_bytes}: it was truncated or "
            "replaced; restore it from its source or pack this split again"
        )


def check_small(path: str, found_bytes: int, max_bytes: int | None) -> None:
    """Raises: FileError when a file has more than `max_bytes`."""
    if max_bytes is not None and found_bytes > max_bytes:
        raise FileError(f"{path} has {found_bytes} bytes, expected at most {max_bytes}; pack this split again")
