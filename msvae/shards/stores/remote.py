"""Stores behind a URL: object stores (S3, Google, Azure) and web servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import IO, Any, TypeVar

from msvae.credentials import check_no_credentials, hide_credentials
from msvae.shards.stores.store import FileError, MissingError, check_size, check_small

RANGE_BEHIND_END = ": 416 "
"""Text in an error of obstore if a request starts at or after the end of a file (HTTP status 416)."""
WRITABLE_SCHEMES = ("s3://", "gs://", "az://")
DOWNLOAD_CHUNK_BYTES = 2**24
"""Size of one request while downloading a large object, so that a lost connection costs one chunk."""

Version = dict[str, str]
"""Identity of the content of an object, as the store reports it: entity tag, version, or both."""
T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts for a request, and the waiting times."""

    attempts: int = 5
    first_wait_s: float = 0.2
    """Pause before the second attempt, in seconds. It doubles before each further attempt."""
    timeout_s: float = 30.0
    """Limit of one request, in seconds."""


class RemoteStore:
    """A URL that is read through obstore. Failed requests are repeated; the final error names the URL."""

    parallel_reads = 16

    def __init__(self, url: str, retry: RetryPolicy) -> None:
        check_no_credentials(url)
        try:
            import obstore
        except ImportError:
            raise ValueError(f"{url} needs the package obstore; pip install 'msvae[cloud]'") from None
        self.location = url.rstrip("/")
        self._retry, self._obstore = retry, obstore
        # the user may set an endpoint with plain http in the environment, for any object store
        plain_http = not url.startswith("https://")
        client = {"timeout": timedelta(seconds=retry.timeout_s), "allow_http": plain_http}
        # this class repeats requests itself, because it also detects a body that is cut or too short
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
        """Return a whole small file, in one request."""

        def get() -> bytes:
            answer = self._obstore.get(self._store, name)
            check_small(self.path(name), answer.meta["size"], max_bytes)
            return bytes(answer.bytes())

        return self._try(name, get)

    def size_bytes(self, name: str) -> int:
        """Return the size from the metadata of the object."""
        return self._try(name, lambda: int(self._obstore.head(self._store, name)["size"]))

    def read_into(
        self, name: str, offset: int, buffers: Sequence[memoryview], expected_bytes: int | None = None
    ) -> int:
        """Fill the buffers with one range request. Its response also contains the size of the file."""
        length = sum(len(buffer) for buffer in buffers)

        def get() -> memoryview:
            try:
                answer = self._obstore.get(self._store, name, options={"range": (offset, offset + length)})
            except self._obstore.exceptions.GenericError as error:
                if expected_bytes is not None and RANGE_BEHIND_END in str(error):
                    check_size(self.path(name), self.size_bytes(name), expected_bytes)
                raise
            if expected_bytes is not None:
                check_size(self.path(name), answer.meta["size"], expected_bytes)
            content = memoryview(answer.bytes()).cast("B")
            if len(content) != length:
                raise _ShortError(f"got {len(content)} of {length} bytes")
            return content

        content = self._try(name, get)
        for buffer in buffers:
            buffer[:] = content[: len(buffer)]
            content = content[len(buffer) :]
        return length

    def read_span(self, name: str, offset: int, length: int) -> bytes:
        """Return part of a file, in one range request."""

        def get() -> bytes:
            try:
                answer = self._obstore.get(self._store, name, options={"range": (offset, offset + length)})
            except self._obstore.exceptions.GenericError as error:
                if RANGE_BEHIND_END in str(error):
                    return b""
                raise
            content = bytes(answer.bytes())
            if len(content) != min(length, answer.meta["size"] - offset):
                raise _ShortError(f"got {len(content)} of {length} bytes")
            return content

        return self._try(name, get) if length else b""

    def names(self) -> list[str]:
        """Return the sorted names of the objects.

        Raises: ValueError if this is a web server, because HTTP has no listing.
        """
        if self.location.startswith(("http://", "https://")):
            raise ValueError(f"{self.location} is a web server, and its files cannot be listed; copy them to a folder")
        listing = self._try("", lambda: self._obstore.list_with_delimiter(self._store))
        return sorted(str(entry["path"]).rsplit("/", 1)[-1] for entry in listing["objects"])

    def path(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.location}/{name}"

    def _try(self, name: str, act: Callable[[], T], action: str = "read") -> T:
        errors, retry = self._obstore.exceptions, self._retry
        for attempt in range(retry.attempts):
            if attempt:
                time.sleep(retry.first_wait_s * 2 ** (attempt - 1))
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
            f"{self.path(name)} could not be {action} in {retry.attempts} attempts ({reason}); "
            "check the network and the store, then run again"
        )


class WritableStore(RemoteStore):
    """An object store that is also written to. An object is replaced as a whole, or not at all."""

    def __init__(self, url: str, retry: RetryPolicy) -> None:
        check_no_credentials(url)
        if not url.startswith(WRITABLE_SCHEMES):
            raise ValueError(f"{url} cannot be written to; give a folder, s3://, gs:// or az://")
        super().__init__(url, retry)

    def sizes_bytes(self) -> dict[str, int]:
        """Return the size of every object by name, including objects in subfolders."""

        def found() -> dict[str, int]:
            return {str(one["path"]): int(one["size"]) for some in self._obstore.list(self._store) for one in some}

        return self._try("", found)

    def put(self, name: str, content: bytes | IO[bytes]) -> None:
        """Write an object. A large one is uploaded in parts."""

        def write() -> None:
            if not isinstance(content, bytes):
                content.seek(0)
            self._obstore.put(self._store, name, content)

        self._write(name, write)

    def put_if(self, name: str, content: bytes, seen: Version | None) -> Version | None:
        """Write an object only if nobody else has changed it.

        Args:
            name: name of the object.
            content: new content.
            seen: version that the object must still have; None if the object must not exist.
        Returns: the new version, or None if the object was not written.
        """
        mode: Any = "create" if seen is None else seen
        errors = self._obstore.exceptions

        def write() -> Version | None:
            try:
                return _version(self._obstore.put(self._store, name, content, mode=mode, use_multipart=False))
            except (errors.AlreadyExistsError, errors.PreconditionError):
                return None

        return self._write(name, write)

    def read_version(self, name: str) -> tuple[bytes, Version]:
        """Return a whole small object and its version."""

        def get() -> tuple[bytes, Version]:
            answer = self._obstore.get(self._store, name)
            return bytes(answer.bytes()), _version(answer.meta)

        return self._try(name, get)

    def download(self, name: str, size_bytes: int, file: IO[bytes]) -> None:
        """Append the content of an object to a file."""
        buffer = memoryview(bytearray(min(size_bytes, DOWNLOAD_CHUNK_BYTES)))
        for offset in range(0, size_bytes, DOWNLOAD_CHUNK_BYTES):
            span = buffer[: min(DOWNLOAD_CHUNK_BYTES, size_bytes - offset)]
            self.read_into(name, offset, [span])
            file.write(span)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects. A missing object is not an error."""
        for name in names:
            with suppress(MissingError):
                self._try(name, partial(self._obstore.delete, self._store, name), "deleted")

    def _write(self, name: str, act: Callable[[], T]) -> T:
        try:
            return self._try(name, act, "written")
        except MissingError:
            raise ValueError(
                f"{self.path(name)} cannot be written: there is no such bucket; create it first"
            ) from None


def _version(answer: Any) -> Version:
    return {key: answer[key] for key in ("e_tag", "version") if answer[key] is not None}


class _ShortError(Exception):
    """A server sent fewer bytes than were requested."""


def _first_line(error: Exception) -> str:
    return hide_credentials((str(error).splitlines() or [type(error).__name__])[0])[:200]
