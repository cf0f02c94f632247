"""An object store that is written to: whole objects, listed, deleted, or replaced only if nobody else has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import IO, Any

from msvae.credentials import check_no_credentials
from msvae.shards.stores.remote import Patience, RemoteStore, T
from msvae.shards.stores.store import MissingError

SCHEMES = ("s3://", "gs://", "az://")
SPAN_BYTES = 2**24
"""Of a large object that is read piece by piece, so that a cut connection costs one piece."""

Version = dict[str, str]
"""What a store calls the content of an object at a time."""


class WritableStore(RemoteStore):
    """A URL whose objects appear whole or not at all. What fails is tried again, then an error that names the URL."""

    def __init__(self, url: str, patience: Patience) -> None:
        check_no_credentials(url)
        if not url.startswith(SCHEMES):
            raise ValueError(f"{url} cannot be written to; give a folder, {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}")
        super().__init__(url, patience)

    def sizes_bytes(self) -> dict[str, int]:
        """Every object, also those in folders, by name."""

        def found() -> dict[str, int]:
            return {str(one["path"]): int(one["size"]) for some in self._obstore.list(self._store) for one in some}

        return self._try("", found)

    def put(self, name: str, content: bytes | IO[bytes]) -> None:
        """Write an object, in parts when it is large."""

        def write() -> None:
            if not isinstance(content, bytes):
                content.seek(0)
            self._obstore.put(self._store, name, content)

        self._write(name, write)

    def put_if(self, name: str, content: bytes, seen: Version | None) -> Version | None:
        """Write an object if it is still as seen, or not there when nothing was.

        Returns: its new version, or None when it was not written.
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
        """A whole small object, and its version."""

        def get() -> tuple[bytes, Version]:
            answer = self._obstore.get(self._store, name)
            return bytes(answer.bytes()), _version(answer.meta)

        return self._try(name, get)

    def download(self, name: str, size_bytes: int, file: IO[bytes]) -> None:
        """Append an object to a file."""
        buffer = memoryview(bytearray(min(size_bytes, SPAN_BYTES)))
        for offset in range(0, size_bytes, SPAN_BYTES):
            span = buffer[: min(SPAN_BYTES, size_bytes - offset)]
            self.read_into(name, offset, [span])
            file.write(span)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        for name in names:
            with suppress(MissingError):
                self._try(name, partial(self._obstore.delete, self._store, name), "deleted")

    def _write(self, name: str, act: Callable[[], T]) -> T:
        try:
            return self._try(name, act, "written")
        except MissingError:
            raise ValueError(f"{self.path(name)} cannot be written: there is no such bucket; make it first") from None


def _version(answer: Any) -> Version:
    return {key: answer[key] for key in ("e_tag", "version") if answer[key] is not None}
