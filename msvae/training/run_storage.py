"""The output of a run: a folder, or an object store with a local copy on each machine.

A resume downloads what it needs from the store; checkpoints, models and logs are uploaded when they change. An object
appears complete or not at all, but a folder of objects does not. Therefore the checksums of a checkpoint are uploaded
after its tensors, and a checkpoint without checksums is ignored. Logs and models are uploaded before the checkpoint
from which a run would resume.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.runs import METRICS, VALIDATION
from msvae.shards.stores.remote import WritableStore
from msvae.training import checkpoints
from msvae.training.lock import ABANDONED_S, UPLOADS, FolderLock, Lock, StoreLock

RECORDS = ("bad-samples/", "stacks/", "trace/")
"""Folders to which every machine adds its own files."""
DOWNLOADED = (METRICS, VALIDATION, "untrained/", *RECORDS)
"""Files that a resumed run reads or appends to. All other files are only added or replaced."""
PARTS = (checkpoints.TENSORS, checkpoints.STATE, checkpoints.CHECKSUMS)
LATEST = f"{checkpoints.FOLDER}/{checkpoints.LATEST}"


class RunStorage:
    """The output of one rank. For a URL, the constructor takes the lock and downloads what a resume needs.

    Raises: ValueError if the URL cannot be written, or another run writes to it.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.damages: list[str] = []
        """The damage of each checkpoint in the store that is newer than the downloaded one."""
        self._config, self._ranks = config, ranks
        self._lock: Lock | None = None
        self._uploads: Uploads | None = None
        self._finished = False
        if config.out_is_url:
            self._open(str(config.out))

    def lock_folder(self) -> None:
        """Create the folder and take its lock, on the main process. A URL is locked already."""
        if self._lock is None:
            self._lock = FolderLock(self._config.folder)

    def upload_later(self) -> None:
        """Start an upload of changed files in the background.

        Raises: ValueError if an earlier upload failed.
        """
        if self._uploads is not None:
            self._uploads.start()

    def finish(self) -> None:
        """Wait until all files are uploaded, on all ranks.

        Raises: ValueError on all ranks if an upload fails.
        """
        self._ranks.run_on_all(self._finish_uploads)
        self._finished = True

    def close(self) -> None:
        """Release the lock. A failed run uploads what it can; a finished run removes the local copy of a store."""
        if self._uploads is not None:
            self._uploads.close()
        if self._lock is not None:
            self._lock.release()
        if self._finished and self._config.out_is_url:
            # other ranks of this machine may still be closing their files
            self._ranks.barrier()
            if self._uploads is not None:
                shutil.rmtree(self._config.folder)

    def _open(self, url: str) -> None:
        if self._config.train.timeout_s < 2 * ABANDONED_S:
            raise ValueError(
                f"train.timeout_s is {self._config.train.timeout_s:g}, expected {2 * ABANDONED_S:g} or more "
                f"for {url}, because all ranks wait while one checks whether an earlier run still writes there; "
                "raise it"
            )
        self._ranks.broadcast_object(lambda: self._lock_url(url))
        self._ranks.run_on_all(lambda: self._download(url))

    def _lock_url(self, url: str) -> None:
        if self._ranks.is_main:
            self._lock = StoreLock(url)

    def _download(self, url: str) -> None:
        if self._ranks.is_main or self._ranks.is_local_main:
            lock = self._lock if isinstance(self._lock, StoreLock) else None
            mirror = Mirror(WritableStore(url, UPLOADS), self._config.folder, lock)
            self.damages = mirror.download()
            self._uploads = Uploads(mirror.upload)

    def _finish_uploads(self) -> None:
        if self._uploads is not None:
            self._uploads.finish()


class Uploads:
    """Runs uploads one after another in a thread. At most one waits. It uploads files as they are when it starts."""

    def __init__(self, upload: Callable[[], None]) -> None:
        self._upload = upload
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="uploads")
        self._pending: deque[Future[None]] = deque()

    def start(self) -> None:
        """Start an upload, unless one is waiting.

        Raises: ValueError if an earlier upload failed.
        """
        while self._pending and self._pending[0].done():
            # a failed upload stays in the queue, so that all later calls fail
            self._pending[0].result()
            self._pending.popleft()
        if len(self._pending) < 2:
            self._pending.append(self._thread.submit(self._upload))

    def finish(self) -> None:
        """Wait for all uploads, and for a last one that uploads all later changes.

        Raises: ValueError if one fails.
        """
        for upload in self._pending:
            upload.result()
        self._pending.append(self._thread.submit(self._upload))
        self._pending[-1].result()

    def close(self) -> None:
        """Upload what is left, if possible, and end the thread."""
        with suppress(ValueError, OSError):
            self.finish()
        self._thread.shutdown(cancel_futures=True)


class Mirror:
    """The local copy of a run on one machine: of all files for the holder of the lock, else only of `RECORDS`."""

    def __init__(self, store: WritableStore, folder: Path, lock: StoreLock | None) -> None:
        self._store, self._folder, self._lock = store, folder, lock
        self._stored = store.sizes_bytes()
        """Size of each object in the store, in bytes."""
        self._uploaded: dict[str, tuple[int, int]] = {}
        """Size and modification time of each file when it was last equal to its object."""

    def download(self) -> list[str]:
        """Replace the folder by the files that a resume needs.

        Returns: the damage of each checkpoint that is newer than the newest undamaged one.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700, parents=True)
        for name in self._stored:
            if name.startswith(DOWNLOADED if self._lock else RECORDS):
                self._download(name)
        return self._download_checkpoints() if self._lock else []

    def upload(self) -> None:
        """Upload changed files: first logs and models, then the newest checkpoint, then earlier ones that are missing.

        Raises: ValueError if the store cannot be written, or another run has taken over the lock.
        """
        if self._lock:
            self._lock.renew()
        for path in self._files():
            self._upload([path])
        if self._lock:
            self._upload_checkpoints(self._lock)

    def _upload_checkpoints(self, lock: StoreLock) -> None:
        for position, path in enumerate(reversed(checkpoints.list_checkpoints(self._folder))):
            # An older checkpoint from the store has no tensors here. One that is removed meanwhile is not needed.
            parts = [path / part for part in PARTS]
            uploaded = parts[0].exists() and self._upload(parts)
            lock.renew()
            if position == 0 and uploaded:
                self._store.put(LATEST, f"{path.name}\n".encode())
                self._delete_removed(path.name)

    def _files(self) -> Iterator[Path]:
        """Yield all files except checkpoints and partial files. Folders may disappear during the iteration."""
        for folder, subfolders, names in os.walk(self._folder):
            subfolders[:] = sorted(name for name in subfolders if name != checkpoints.FOLDER and name[0] != ".")
            # config.json is last, because a folder without it does not count as a model
            for name in sorted(names, key=lambda name: (name.endswith(".json"), name)):
                path = Path(folder) / name
                if not name.startswith(".") and (self._lock or self._name(path).startswith(RECORDS)):
                    yield path

    def _upload(self, paths: Sequence[Path]) -> bool:
        """Upload files that changed. Returns False if one of them does not exist.

        All files are opened first, so that their content is consistent even if they are replaced or removed meanwhile.
        """
        with ExitStack() as stack:
            try:
                files = [(self._name(path), stack.enter_context(path.open("rb"))) for path in paths]
            except FileNotFoundError:
                return False
            for name, file in files:
                stamp = _stamp(file)
                if self._uploaded.get(name) != stamp and stamp[0]:
                    if self._lock:
                        self._lock.renew_if_due()
                    # a log may grow while it is uploaded, so its content is read at once
                    self._store.put(name, file if name.endswith(".safetensors") else _content(name, file))
                    self._uploaded[name], self._stored[name] = stamp, stamp[0]
        return True

    def _delete_removed(self, newest: str) -> None:
        """Delete checkpoints from the store that were removed from the folder."""
        for step in self._stored_steps():
            if step != newest and not (self._folder / checkpoints.FOLDER / step).exists():
                names = [f"{checkpoints.FOLDER}/{step}/{part}" for part in reversed(PARTS)]
                self._store.delete([name for name in names if self._stored.pop(name, None) is not None])

    def _download_checkpoints(self) -> list[str]:
        """Download the newest undamaged checkpoint, and the state of each earlier one."""
        damages: list[str] = []
        damaged: list[Path] = []
        found = False
        for step in reversed(self._stored_steps()):
            name, path = f"{checkpoints.FOLDER}/{step}", self._folder / checkpoints.FOLDER / step
            missing = [part for part in PARTS if f"{name}/{part}" not in self._stored]
            if found and not missing:
                # retention needs the score; without tensors the folder does not count as a checkpoint
                self._download(f"{name}/{checkpoints.STATE}")
            elif not found and missing:
                damages.append(f"{self._store.path(name)} lacks {missing[0]}: its upload was not finished")
            elif not found:
                damage = self._download_checkpoint(path)
                found = not damage
                damaged += [path] if damage else []
                damages += [damage] if damage else []
        for path in damaged if found else []:
            shutil.rmtree(path)
        return damages

    def _download_checkpoint(self, path: Path) -> str:
        """Download a checkpoint. Returns its damage, empty if it has none."""
        for part in PARTS:
            self._download(self._name(path / part))
        try:
            checkpoints.check(path)
        except ValueError as error:
            return str(error).replace(str(self._folder), self._store.location)
        return ""

    def _stored_steps(self) -> list[str]:
        names = (Path(name).parts for name in self._stored if name.startswith(f"{checkpoints.FOLDER}/step-"))
        return sorted({parts[1] for parts in names if len(parts) == 3})

    def _download(self, name: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            self._store.download(name, self._stored[name], file)
            file.flush()
            self._uploaded[name] = _stamp(file)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _content(name: str, file: IO[bytes]) -> bytes:
    """Return the content of a file. Return only the complete lines of a log."""
    content = file.read()
    return content[: content.rfind(b"\n") + 1] if name.endswith(".jsonl") else content
