"""Where a run writes: a folder, or an object store that each machine holds a mirror of."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.shards.stores.remote import WritableStore
from msvae.training.lock import ABANDONED_S, UPLOADS, FolderLock, Lock, StoreLock
from msvae.training.mirror import Mirror


class RunPlace:
    """Of one rank. Making it takes the lock of a URL and fetches what a resume needs; of a folder it does nothing.

    Raises: ValueError when the URL cannot be written, or is being written by another run.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.faults: list[str] = []
        self._config, self._ranks = config, ranks
        self._lock: Lock | None = None
        self._uploads: Uploads | None = None
        self._finished = False
        if config.out_is_url:
            self._open(str(config.out))

    def take(self) -> None:
        """Take the lock of a folder, which is made only now; of the main process."""
        if self._lock is None:
            self._lock = FolderLock(self._config.folder)

    def offer(self) -> None:
        """Have uploaded what changed, later.

        Raises: ValueError when an earlier upload failed.
        """
        if self._uploads is not None:
            self._uploads.offer()

    def finish(self) -> None:
        """Return when everything is uploaded, on all ranks at once.

        Raises: ValueError when it cannot be.
        """
        self._ranks.run_on_all(self._upload_rest)
        self._finished = True

    def close(self) -> None:
        """Let others have the place. A run that failed uploads what it can, one that finished leaves no mirror."""
        if self._uploads is not None:
            self._uploads.close()
        if self._lock is not None:
            self._lock.release()
        if self._finished and self._config.out_is_url:
            # other ranks of this machine may still close their files
            self._ranks.barrier()
            if self._uploads is not None:
                shutil.rmtree(self._config.folder)

    def _open(self, url: str) -> None:
        if self._config.train.timeout_s < 2 * ABANDONED_S:
            raise ValueError(
                f"train.timeout_s is {self._config.train.timeout_s:g}, expected {2 * ABANDONED_S:g} or more "
                f"for {url}, where all ranks wait while one sees whether an earlier run still writes there"
            )
        self._ranks.broadcast_object(lambda: self._take_url(url))
        self._ranks.run_on_all(lambda: self._fetch(url))

    def _take_url(self, url: str) -> None:
        if self._ranks.is_main:
            self._lock = StoreLock(url)

    def _fetch(self, url: str) -> None:
        if self._ranks.is_main or self._ranks.is_local_main:
            lock = self._lock if isinstance(self._lock, StoreLock) else None
            mirror = Mirror(WritableStore(url, UPLOADS), self._config.folder, lock)
            self.faults = mirror.fetch()
            self._uploads = Uploads(mirror.push)

    def _upload_rest(self) -> None:
        if self._uploads is not None:
            self._uploads.finish()


class Uploads:
    """One after the other, in a thread. At most one waits: it takes what is newest when its turn comes."""

    def __init__(self, push: Callable[[], None]) -> None:
        self._push = push
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="uploads")
        self._pushes: deque[Future[None]] = deque()

    def offer(self) -> None:
        """See `RunPlace.offer`."""
        while self._pushes and self._pushes[0].done():
            # one that failed stays, and fails all that follow
            self._pushes[0].result()
            self._pushes.popleft()
        if len(self._pushes) < 2:
            self._pushes.append(self._thread.submit(self._push))

    def finish(self) -> None:
        """See `RunPlace.finish`."""
        for push in self._pushes:
            push.result()
        self._pushes.append(self._thread.submit(self._push))
        self._pushes[-1].result()

    def close(self) -> None:
        """Upload what is left, if that goes, and end the thread."""
        with suppress(ValueError, OSError):
            self.finish()
        self._thread.shutdown(cancel_futures=True)
