"""A store in a local folder."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msvae.shards.stores.store import MissingError, check_size, check_small

MAX_OPEN_FILES = 256
"""Limit of open files, well below the default limit of 1,024 per process."""


class LocalStore:
    """A folder of files, read with positioned reads (`pread`)."""

    parallel_reads = 1

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder
        # every sample needs a path, and pathlib would cost a tenth of the time to read the sample
        self._prefix = str(folder / "_")[:-1]
        self._open_files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """Return a whole small file."""
        with self._readable(name):
            path = self._existing(name)
            check_small(self.path(name), path.stat().st_size, max_bytes)
            return path.read_bytes()

    def size_bytes(self, name: str) -> int:
        """Return the size that the file system reports."""
        with self._readable(name):
            return self._existing(name).stat().st_size

    def read_into(
        self, name: str, offset: int, buffers: Sequence[memoryview], expected_bytes: int | None = None
    ) -> int:
        """Fill the buffers with one system call, after another one for the size of the file."""
        with self._readable(name):
            file = self._open(name)
            if expected_bytes is not None:
                check_size(self.path(name), os.fstat(file.descriptor).st_size, expected_bytes)
            return os.preadv(file.descriptor, list(buffers), offset)

    def read_span(self, name: str, offset: int, length: int) -> bytes:
        """Return part of a file.

        The size of the file limits the length, because a length from a damaged index could exceed memory.
        """
        with self._readable(name):
            file = self._open(name)
            size_bytes = os.fstat(file.descriptor).st_size
            return os.pread(file.descriptor, max(0, min(length, size_bytes - offset)), offset)

    def names(self) -> list[str]:
        """Return the sorted names of the files in the folder."""
        if not self._folder.is_dir():
            raise MissingError(self.location)
        with self._readable(""):
            return sorted(path.name for path in self._folder.iterdir() if path.is_file())

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return self._prefix + name if name else self.location

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.path(name)} cannot be read ({error.strerror}); check its permissions and the disk"
            ) from error

    def _existing(self, name: str) -> Path:
        path = self._folder / name
        if not path.is_file():
            raise MissingError(str(path))
        return path

    def _open(self, name: str) -> _OpenFile:
        with self._lock:
            if name not in self._open_files:
                self._open_files[name] = _OpenFile(self._existing(name))
                if len(self._open_files) > MAX_OPEN_FILES:
                    self._open_files.popitem(last=False)
            self._open_files.move_to_end(name)
            return self._open_files[name]


class _OpenFile:
    """A file descriptor that is closed when its last reader releases it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
