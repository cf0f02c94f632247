"""Where shards lie: a folder, or a URL of an object store (S3, Google, Azure) or web server. Reading only."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from msvae.credentials import hidden, refuse_in_url

MAX_OPEN_FILES = 256
"""Well under the 1,024 files that a process may hold open by default."""

RANGE_BEHIND_END = ": 416 "
"""In an error of obstore: the status of a server that was asked for bytes behind the end of a file."""

T = TypeVar("T")


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


@dataclass(frozen=True)
class Patience:
    """How long a remote store is waited for before it is an error."""

    attempts: int = 5
    first_wait_s: float = 0.2
    """Before the second attempt; twice as long before each further one."""
    timeout_s: float = 30.0
    """For one request."""


def open_store(location: str | Path, patience: Patience | None = None) -> Store:
    """The store at a folder, `file://`, `s3://`, `gs://`, `az://`, `http://` or `https://`.

    Credentials and endpoints come from the environment, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.
    Raises: ValueError for a URL that is not understood, or that holds credentials.
    """
    text = os.fspath(location)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemoteStore(text, patience or Patience()) if "://" in text else LocalStore(Path(text))


class LocalStore:
    """A folder, read with positioned reads."""

    parallel_reads = 1

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder
        # a path is asked for with every sample: pathlib would take a tenth of its time
        self._prefix = str(folder / "_")[:-1]
        self._open_files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """A whole small file."""
        with self._readable(name):
            path = self._existing(name)
            _check_small(self.path(name), path.stat().st_size, max_bytes)
            return path.read_bytes()

    def size_bytes(self, name: str) -> int:
        """From the file system."""
        with self._readable(name):
            return self._existing(name).stat().st_size

    def read_into(
        self, name: str, offset: int, buffers: Sequence[memoryview], expected_bytes: int | None = None
    ) -> int:
        """One system call, straight into the buffers, after one for the size."""
        with self._readable(name):
            file = self._open(name)
            if expected_bytes is not None:
                _check_size(self.path(name), os.fstat(file.descriptor).st_size, expected_bytes)
            return os.preadv(file.descriptor, list(buffers), offset)

    def read_span(self, name: str, offset: int, length: int) -> bytes:
        """One system call, after one for the size: a length from a damaged file is not to be allocated."""
        with self._readable(name):
            file = self._open(name)
            size_bytes = os.fstat(file.descriptor).st_size
            return os.pread(file.descriptor, max(0, min(length, size_bytes - offset)), offset)

    def names(self) -> list[str]:
        """From the file system."""
        if not self._folder.is_dir():
            raise MissingError(self.location)
        with self._readable(""):
            return sorted(path.name for path in self._folder.iterdir() if path.is_file())

    def path(self, name: str) -> str:
        """Folder and name."""
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
    """Closes when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class RemoteStore:
    """A URL read through obstore. What fails is tried again, then an error that names the URL."""

    parallel_reads = 16

    def __init__(self, url: str, patience: Patience) -> None:
        refuse_in_url(url)
        try:
            import obstore
        except ImportError:
            raise ValueError(f"{url} needs the package obstore; pip install 'msvae[cloud]'") from None
        self.location = url.rstrip("/")
        self._patience, self._obstore = patience, obstore
        # an endpoint of the environment, whichever store's, may be plain http: it was chosen
        plain_http = not url.startswith("https://")
        client = {"timeout": timedelta(seconds=patience.timeout_s), "allow_http": plain_http}
        # attempts are counted here, where also a body that is cut or too short is seen
        try:
            self._store: Any = obstore.store.from_url(
                self.location, client_options=client, retry_config={"max_retries": 0}
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            fix = (
                "set what this store needs in the environment, see docs/streaming.md"
                if url.startswith(("s3://", "gs://", "az://"))
                else "give a folder, s3://, gs://, az:// or https://"
            )
            raise ValueError(f"{url} cannot be opened ({_first_line(error)}); {fix}") from error

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """A whole small file, in one request."""

        def get() -> bytes:
            answer = self._obstore.get(self._store, name)
            _check_small(self.path(name), answer.meta["size"], max_bytes)
            return bytes(answer.bytes())

        return self._try(name, get)

    def size_bytes(self, name: str) -> int:
        """From the object's description."""
        return self._try(name, lambda: int(self._obstore.head(self._store, name)["size"]))

    def read_into(
        self, name: str, offset: int, buffers: Sequence[memoryview], expected_bytes: int | None = None
    ) -> int:
        """One range request, whose answer also tells the size of the file."""
        length = sum(len(buffer) for buffer in buffers)

        def get() -> memoryview:
            try:
                answer = self._obstore.get(self._store, name, options={"range": (offset, offset + length)})
            except self._obstore.exceptions.GenericError as error:
                if expected_bytes is not None and RANGE_BEHIND_END in str(error):
                    _check_size(self.path(name), self.size_bytes(name), expected_bytes)
                raise
            if expected_bytes is not None:
                _check_size(self.path(name), answer.meta["size"], expected_bytes)
            content = memoryview(answer.bytes()).cast("B")
            if len(content) != length:
                raise _ShortError(f"{len(content)} bytes came of {length}")
            return content

        content = self._try(name, get)
        for buffer in buffers:
            buffer[:] = content[: len(buffer)]
            content = content[len(buffer) :]
        return length

    def read_span(self, name: str, offset: int, length: int) -> bytes:
        """One range request."""

        def get() -> bytes:
            try:
                answer = self._obstore.get(self._store, name, options={"range": (offset, offset + length)})
            except self._obstore.exceptions.GenericError as error:
                if RANGE_BEHIND_END in str(error):
                    return b""
                raise
            content = bytes(answer.bytes())
            if len(content) != min(length, answer.meta["size"] - offset):
                raise _ShortError(f"{len(content)} bytes came of {length}")
            return content

        return self._try(name, get) if length else b""

    def names(self) -> list[str]:
        """One listing; web servers have none."""
        if self.location.startswith(("http://", "https://")):
            raise ValueError(f"{self.location} is a web server, whose files cannot be listed; copy them to a folder")
        listing = self._try("", lambda: self._obstore.list_with_delimiter(self._store))
        return sorted(str(entry["path"]).rsplit("/", 1)[-1] for entry in listing["objects"])

    def path(self, name: str) -> str:
        """URL of a file."""
        return f"{self.location}/{name}"

    def _try(self, name: str, act: Callable[[], T], done: str = "read") -> T:
        errors, patience = self._obstore.exceptions, self._patience
        for attempt in range(patience.attempts):
            if attempt:
                time.sleep(patience.first_wait_s * 2 ** (attempt - 1))
            try:
                return act()
            except (errors.NotFoundError, FileNotFoundError) as error:
                raise MissingError(self.path(name)) from error
            except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
                raise FileError(
                    f"{self.path(name)}: access denied; check the credentials in the environment "
                    f"({_first_line(error)})"
                ) from error
            except (errors.BaseError, _ShortError) as error:
                reason = _first_line(error)
        raise FileError(
            f"{self.path(name)} could not be {done} in {patience.attempts} attempts ({reason}); "
            "check the network and the store, then run again"
        )


def _check_size(path: str, found_bytes: int, expected_bytes: int) -> None:
    if found_bytes != expected_bytes:
        raise FileError(
            f"shard {path} has {found_bytes} bytes, the manifest expects {expected_bytes}: it was truncated or "
            "replaced; restore it from its source or pack this split again"
        )


def _check_small(path: str, found_bytes: int, max_bytes: int | None) -> None:
    if max_bytes is not None and found_bytes > max_bytes:
        raise FileError(f"{path} has {found_bytes} bytes, expected at most {max_bytes}; pack this split again")


class _ShortError(Exception):
    """A server sent fewer bytes than asked for."""


def _first_line(error: Exception) -> str:
    return hidden((str(error).splitlines() or [type(error).__name__])[0])[:200]
