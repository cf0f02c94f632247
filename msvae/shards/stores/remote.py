"""A URL of an object store (S3, Google, Azure) or web server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from msvae.credentials import check_no_credentials, hide_credentials
from msvae.shards.stores.store import FileError, MissingError, check_size, check_small

RANGE_BEHIND_END = ": 416 "
"""In an error of obstore: the status of a server that was asked for bytes behind the end of a file."""

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a remote store is waited for before it is an error."""

    attempts: int = 5
    first_wait_s: float = 0.2
    """Before the second attempt; twice as long before each further one."""
    timeout_s: float = 30.0
    """For one request."""


class RemoteStore:
    """A URL read through obstore. What fails is tried again, then an error that names the URL."""

    parallel_reads = 16

    def __init__(self, url: str, patience: Patience) -> None:
        check_no_credentials(url)
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
            check_small(self.path(name), answer.meta["size"], max_bytes)
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
                    check_size(self.path(name), self.size_bytes(name), expected_bytes)
                raise
            if expected_bytes is not None:
                check_size(self.path(name), answer.meta["size"], expected_bytes)
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


class _ShortError(Exception):
    """A server sent fewer bytes than asked for."""


def _first_line(error: Exception) -> str:
    return hide_credentials((str(error).splitlines() or [type(error).__name__])[0])[:200]
