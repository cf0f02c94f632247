"""Where a split lies: reading its files by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class Store(Protocol):
    """The files directly inside one place. Safe to use from several threads at once."""

    location: str
    """Folder or URL, for messages."""

    def read(self, name: str) -> bytes:
        """A whole small file. Raises: ValueError naming it when it is missing."""

    def size_bytes(self, name: str) -> int:
        """Raises: ValueError naming the file when it is missing."""

    def read_span(self, name: str, offset: int, length: int) -> bytes:
        """Part of a file; fewer bytes than asked where it ends."""

    def names(self) -> list[str]:
        """Files directly inside."""


def open_store(location: str | Path) -> Store:
    """The store at a folder.

    Raises: ValueError when there is none.
    """
    if "://" in str(location) or not Path(location).is_dir():
        raise ValueError(f"{location} is not a folder; name one that holds shards")
    return LocalStore(Path(location))


class LocalStore:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder

    def read(self, name: str) -> bytes:
        """A whole small file."""
        return self._existing(name).read_bytes()

    def size_bytes(self, name: str) -> int:
        """Size of a file."""
        return self._existing(name).stat().st_size

    def read_span(self, name: str, offset: int, length: int) -> bytes:
        """Part of a file."""
        descriptor = os.open(self._existing(name), os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        """Files directly inside."""
        return sorted(path.name for path in self._folder.iterdir() if path.is_file())

    def _existing(self, name: str) -> Path:
        path = self._folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; restore it from its source or pack this split again")
        return path
