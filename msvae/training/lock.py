"""Locks: only one run at a time writes to a folder or to a URL of an object store."""

from __future__ import annotations

import atexit
import errno
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from msvae.shards.stores.remote import RetryPolicy, Version, WritableStore
from msvae.shards.stores.store import MissingError

NAME = "run.lock"
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EISDIR}
"""Errors of opening the file of a lock, which do not tell whether its file system has locks."""
RENEW_S = 30.0
ABANDONED_S = 100.0
"""Time without a renewal after which a lock is taken over: three missed renewals, and the time that they may need. The
waiting process measures this time, so the clocks of the machines may differ."""
POLL_S = 2.0
UPLOADS = RetryPolicy(attempts=9, first_wait_s=0.5)
"""About two minutes of retries. No step waits for an upload, so a short outage of the store does not end the run."""


class Lock(Protocol):
    """A lock that the main process holds from its creation. Creation raises ValueError if another run holds it."""

    def release(self) -> None:
        """Release the lock for other runs."""


class FolderLock:
    """Lock of a folder. The operating system releases it when the process ends for any reason.

    Raises: ValueError that names the holder, or says that the file cannot be written or the file system has no locks.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / NAME
        self._lock = FileLock(path, blocking=False, fallback_to_soft=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise _locked(out, path.read_text().strip() or "another process") from None
        except OSError as error:
            if error.errno in DENIED:
                raise ValueError(
                    f"{path} cannot be locked ({error.strerror}); make it a writable file, or choose another `out`"
                ) from error
            raise ValueError(
                f"{out} is on a file system without locks ({error.strerror}), so a second run could write to it at "
                "the same time; choose an `out` elsewhere, or mount it with flock"
            ) from error
        # FileLock does not write to the file
        path.write_text(f"{_this_process()}\n")

    def release(self) -> None:
        """Release the lock. The file stays."""
        self._lock.release()


class StoreLock:
    """Lock of a URL: an object that a thread renews. If it is not renewed, another run takes it over."""

    def __init__(self, url: str) -> None:
        self._store = WritableStore(url, RetryPolicy())
        self._id, self._renewals, self._lost = uuid.uuid4().hex, 0, False
        self._mutex, self._released = threading.Lock(), threading.Event()
        self._version, self._renewed_at_s = self._acquire(), time.monotonic()
        self._store = WritableStore(url, UPLOADS)
        self._thread = threading.Thread(target=self._renew_regularly, name="lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def renew(self) -> None:
        """Renew the lock now.

        Raises: ValueError if another run has taken it over.
        """
        with self._mutex:
            version = None if self._lost else self._write(self._version)
            if version is None:
                self._lost = True
                raise ValueError(
                    f"{self._store.path(NAME)} no longer belongs to this run but to "
                    f"{_holder(self._read()[0]) or 'nobody'}: it was not renewed for {ABANDONED_S:.0f} s, or was "
                    "removed. Wait for the other run or end it, then run the same command again"
                )
            self._version, self._renewed_at_s = version, time.monotonic()

    def renew_if_due(self) -> None:
        """Renew the lock if the last renewal is older than `RENEW_S`.

        Raises: ValueError if another run has taken it over.
        """
        if time.monotonic() - self._renewed_at_s > RENEW_S:
            self.renew()

    def release(self) -> None:
        """Remove the object. Otherwise the next run waits before it takes the lock over."""
        atexit.unregister(self.release)
        self._released.set()
        self._thread.join()
        with suppress(ValueError):
            self.renew()
            self._store.delete([NAME])

    def _renew_regularly(self) -> None:
        while not self._released.wait(RENEW_S):
            # a failed renewal is repeated at the next one, and each upload calls `renew` before it writes
            with suppress(ValueError):
                self.renew()

    def _acquire(self) -> Version:
        seen: Version | None = None
        while (version := self._write(seen)) is None:
            seen = self._wait_for_abandoned()
        return version

    def _write(self, seen: Version | None) -> Version | None:
        """Write the object if its version is still `seen`. Returns its new version, or None if it was not written."""
        self._renewals += 1
        version = self._store.put_if(NAME, f"{_this_process()} {self._id} {self._renewals}".encode(), seen)
        if version is None:
            content, now = self._read()
            # the response may have been lost after the object was written
            return now if self._id in content else None
        return version

    def _wait_for_abandoned(self) -> Version | None:
        """Return the version that was not renewed for `ABANDONED_S`, or None if the object was removed.

        Raises: ValueError if it was renewed.
        """
        content, first = self._read()
        print(
            f"{self._store.path(NAME)} belongs to {_holder(content) or 'nobody'}; waiting up to {ABANDONED_S:.0f} s "
            "to see whether that run is still running",
            flush=True,
        )
        start_s, now = time.monotonic(), first
        while now is not None and time.monotonic() - start_s < ABANDONED_S:
            time.sleep(POLL_S)
            content, now = self._read()
            if now not in (first, None):
                raise _locked(self._store.location, _holder(content))
        return now

    def _read(self) -> tuple[str, Version | None]:
        try:
            content, version = self._store.read_version(NAME)
        except MissingError:
            return "", None
        return content.decode(), version


def _holder(content: str) -> str:
    return content.rsplit(" ", 2)[0]


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _locked(out: Path | str, holder: str) -> ValueError:
    return ValueError(f"{out} is in use by {holder}; wait until it ends, or choose another `out`")
