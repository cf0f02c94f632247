"""A run's folder and its copy in an object store: what a resume needs comes down, what changed goes up.

An object appears whole or not at all, a folder of them does not. So checksums go up after their tensors, and a
checkpoint without them counts as none; logs and models go up before the checkpoint that a run would go on from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from msvae.runs import METRICS, VALIDATION
from msvae.shards.stores.remote import WritableStore
from msvae.training import checkpoints
from msvae.training.lock import StoreLock

RECORDS = ("bad-samples/", "stacks/", "trace/")
"""What every machine writes of its own."""
FETCHED = (METRICS, VALIDATION, "untrained/", *RECORDS)
"""What a resumed run goes on with; the rest is only added to or replaced."""
PARTS = (checkpoints.TENSORS, checkpoints.STATE, checkpoints.CHECKSUMS)
LATEST = f"{checkpoints.FOLDER}/{checkpoints.LATEST}"


class Mirror:
    """Of one machine. With the main process's lock it is of everything, without one only of RECORDS."""

    def __init__(self, store: WritableStore, folder: Path, lock: StoreLock | None) -> None:
        self._store, self._folder, self._lock = store, folder, lock
        self._there = store.sizes_bytes()
        self._sent: dict[str, tuple[int, int]] = {}

    def fetch(self) -> list[str]:
        """Make the folder anew with what a resume needs.

        Returns: what is wrong with checkpoints after the newest whole one.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700, parents=True)
        for name in self._there:
            if name.startswith(FETCHED if self._lock else RECORDS):
                self._download(name)
        return self._fetch_checkpoints() if self._lock else []

    def push(self) -> None:
        """Upload what changed: the newest checkpoint after all that belongs to it, then earlier ones not there yet.

        Raises: ValueError when the store cannot be written, or another run has taken it over.
        """
        if self._lock:
            self._lock.hold()
        for path in self._files():
            self._upload([path])
        if self._lock:
            self._push_checkpoints(self._lock)

    def _push_checkpoints(self, lock: StoreLock) -> None:
        for newest, path in enumerate(reversed(checkpoints.found(self._folder))):
            # that of an older one from the store has no tensors here, and one that is dropped meanwhile is of no use
            parts = [path / part for part in PARTS]
            uploaded = parts[0].exists() and self._upload(parts)
            lock.hold()
            if newest == 0 and uploaded:
                self._store.put(LATEST, f"{path.name}\n".encode())
                self._delete_dropped(path.name)

    def _files(self) -> Iterator[Path]:
        """All but checkpoints and what is half written. Folders may vanish on the way."""
        for place, folders, names in os.walk(self._folder):
            folders[:] = sorted(name for name in folders if name != checkpoints.FOLDER and not name.startswith("."))
            # a model without its config.json is not taken for one, so that goes last
            for name in sorted(names, key=lambda name: (name.endswith(".json"), name)):
                path = Path(place) / name
                if not name.startswith(".") and (self._lock or self._name(path).startswith(RECORDS)):
                    yield path

    def _upload(self, paths: Sequence[Path]) -> bool:
        """Files that stay as they were opened, even if they are replaced or removed meanwhile."""
        with ExitStack() as stack:
            try:
                files = [(self._name(path), stack.enter_context(path.open("rb"))) for path in paths]
            except FileNotFoundError:
                return False
            for name, file in files:
                stamp = _stamp(file)
                if self._sent.get(name) != stamp and stamp[0]:
                    if self._lock:
                        self._lock.keep()
                    # a log may grow while it is uploaded
                    self._store.put(name, file if name.endswith(".safetensors") else _content(name, file))
                    self._sent[name], self._there[name] = stamp, stamp[0]
        return True

    def _delete_dropped(self, uploaded: str) -> None:
        for step in self._steps():
            if step != uploaded and not (self._folder / checkpoints.FOLDER / step).exists():
                names = [f"{checkpoints.FOLDER}/{step}/{part}" for part in reversed(PARTS)]
                self._store.delete([name for name in names if self._there.pop(name, None) is not None])

    def _fetch_checkpoints(self) -> list[str]:
        faults: list[str] = []
        damaged: list[Path] = []
        whole = False
        for step in reversed(self._steps()):
            name, path = f"{checkpoints.FOLDER}/{step}", self._folder / checkpoints.FOLDER / step
            lacking = [part for part in PARTS if f"{name}/{part}" not in self._there]
            if whole and not lacking:
                # of those before only what retention asks for; without tensors nobody takes them for whole
                self._download(f"{name}/{checkpoints.STATE}")
            elif not whole and lacking:
                faults.append(f"{self._store.path(name)} lacks {lacking[0]}: its upload did not end")
            elif not whole:
                fault = self._fetch_checkpoint(path)
                whole = not fault
                damaged += [path] if fault else []
                faults += [fault] if fault else []
        for path in damaged if whole else []:
            shutil.rmtree(path)
        return faults

    def _fetch_checkpoint(self, path: Path) -> str:
        for part in PARTS:
            self._download(self._name(path / part))
        try:
            checkpoints.check(path)
        except ValueError as fault:
            return str(fault).replace(str(self._folder), self._store.location)
        return ""

    def _steps(self) -> list[str]:
        names = (Path(name).parts for name in self._there if name.startswith(f"{checkpoints.FOLDER}/step-"))
        return sorted({parts[1] for parts in names if len(parts) == 3})

    def _download(self, name: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            self._store.download(name, self._there[name], file)
            file.flush()
            self._sent[name] = _stamp(file)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _content(name: str, file: IO[bytes]) -> bytes:
    content = file.read()
    return content[: content.rfind(b"\n") + 1] if name.endswith(".jsonl") else content
