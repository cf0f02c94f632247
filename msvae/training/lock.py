"""One run at a time writes to a folder, or to an object store."""

from __future__ import annotations

import atexit
import fcntl
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from msvae.shards.stores.remote import RetryPolicy, Version, WritableStore
from msvae.shards.stores.store import MissingError

NAME = "run.lock"
RENEW_S = 30.0
ABANDONED_S = 100.0
"""Three renewals missed, and the time that they may take. Counted by who waits, so clocks need not agree."""
LOOK_S = 2.0
UPLOADS = RetryPolicy(attempts=9, first_wait_s=0.5)
"""Some two minutes: nobody waits for an upload, so a short outage of the store need not end the run."""


class Lock(Protocol):
    """Held by the main process from when it is made. Making one raises ValueError naming another run's holder."""

    def release(self) -> None:
        """Let others have it."""


class FolderLock:
    """Of a folder, as long as the process lives, however it ends."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (out / NAME).open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            raise _taken(out, self._file.read().strip() or "another process") from None
        except OSError as error:
            raise ValueError(
                f"{out} lies on a file system without locks ({error.strerror}), so nothing keeps a second run "
                "from it; choose an `out` elsewhere, or mount it with flock"
            ) from error
        self._file.truncate(0)
        self._file.write(f"{_me()}\n")
        self._file.flush()

    def release(self) -> None:
        """Close the file."""
        self._file.close()


class StoreLock:
    """Of a URL: an object that a thread renews. One that is not renewed was left behind, and is taken over."""

    def __init__(self, url: str) -> None:
        self._store = WritableStore(url, RetryPolicy())
        self._id, self._renewals, self._lost = uuid.uuid4().hex, 0, False
        self._turn, self._ended = threading.Lock(), threading.Event()
        self._version, self._held_at_s = self._take(), time.monotonic()
        self._store = WritableStore(url, UPLOADS)
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def hold(self) -> None:
        """Renew it now, unless another run has written it since.

        Raises: ValueError when one has.
        """
        with self._turn:
            version = None if self._lost else self._write(self._version)
            if version is None:
                self._lost = True
                raise ValueError(
                    f"{self._store.path(NAME)} is no longer that of this run but of "
                    f"{_holder(self._look()[0]) or 'nobody'}: it was not renewed for {ABANDONED_S:.0f} s, or removed. "
                    "End the other run or let it go on, then run again"
                )
            self._version, self._held_at_s = version, time.monotonic()

    def keep(self) -> None:
        """Renew it when that is due.

        Raises: ValueError as `hold`.
        """
        if time.monotonic() - self._held_at_s > RENEW_S:
            self.hold()

    def release(self) -> None:
        """Remove the object. Without that, the next run waits before it takes over."""
        atexit.unregister(self.release)
        self._ended.set()
        self._thread.join()
        with suppress(ValueError):
            self.hold()
            self._store.delete([NAME])

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            # what fails is tried again at the next renewal, and whoever is about to write asks `hold`
            with suppress(ValueError):
                self.hold()

    def _take(self) -> Version:
        seen: Version | None = None
        while (version := self._write(seen)) is None:
            seen = self._abandoned()
        return version

    def _write(self, seen: Version | None) -> Version | None:
        self._renewals += 1
        version = self._store.put_if(NAME, f"{_me()} {self._id} {self._renewals}".encode(), seen)
        if version is None:
            content, now = self._look()
            # an answer can get lost after the object was written
            return now if self._id in content else None
        return version

    def _abandoned(self) -> Version | None:
        """The version that nobody renewed, or None when the object is gone.

        Raises: ValueError when it was renewed.
        """
        content, first = self._look()
        print(
            f"{self._store.path(NAME)} is of {_holder(content) or 'nobody'}; waiting up to {ABANDONED_S:.0f} s to see "
            "whether that still runs",
            flush=True,
        )
        began_s, now = time.monotonic(), first
        while now is not None and time.monotonic() - began_s < ABANDONED_S:
            time.sleep(LOOK_S)
            content, now = self._look()
            if now not in (first, None):
                raise _taken(self._store.location, _holder(content))
        return now

    def _look(self) -> tuple[str, Version | None]:
        try:
            content, version = self._store.read_version(NAME)
        except MissingError:
            return "", None
        return content.decode(), version


def _holder(content: str) -> str:
    return content.rsplit(" ", 2)[0]


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _taken(out: Path | str, holder: str) -> ValueError:
    return ValueError(f"{out} is being written by {holder}; wait for it, or choose another `out`")
