"""The folder beside the output in which a data set grows, and which outlives a process that is killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msvae.files import partial_path

MAX_TOLD = 5


@dataclass(frozen=True)
class WorkFolder:
    """`.OUT.partial`: all that has been made so far. Whatever is there under its name is complete."""

    path: Path

    @property
    def data(self) -> Path:
        """What becomes the output."""
        return self.path / "data"

    @property
    def record(self) -> Path:
        """Options and inputs of the work that was begun here."""
        return self.path / "record.json"

    @property
    def masks(self) -> Path:
        """What only whole images tell of their masks."""
        return self.path / "masks"

    def cells(self, image: int, first_row: int) -> Path:
        """Leaf pixels of the cells of an image, from one row of cells on."""
        return self.path / "survey" / f"cells-{image:06d}-{first_row:06d}.npz"

    def tiles(self, image: int) -> Path:
        """Tiles of an image."""
        return self.path / "survey" / f"tiles-{image:06d}.json"

    def statistics(self, shard_name: str) -> Path:
        """Leaf values of a training shard."""
        return self.path / "statistics" / f"{shard_name}.npz"

    def begin(self, record: dict[str, Any]) -> None:
        """Go on with the work that was begun here, or begin.

        Raises: ValueError when that had other options or inputs.
        """
        partial = partial_path(self.record)
        partial.write_text(json.dumps(record))
        try:  # of the parts that begin together one is first, and all compare with it
            os.link(partial, self.record)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links: parts must not begin at the same instant
            if not self.record.exists():
                partial.replace(self.record)
        partial.unlink(missing_ok=True)
        changes = _changes(json.loads(self.record.read_text()), json.loads(json.dumps(record)))
        if changes:
            more = f" and {len(changes) - MAX_TOLD} more" if len(changes) > MAX_TOLD else ""
            raise ValueError(
                f"{self.path} holds unfinished work of other options or inputs ({'; '.join(changes[:MAX_TOLD])}"
                f"{more}); give the same to go on, or delete that folder to begin anew"
            )
        for folder in ("masks", "survey", "statistics", "data"):
            (self.path / folder).mkdir(exist_ok=True)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A text for each option and each input file that is not what it was."""
    old, new = before["options"], now["options"]
    # as text, for NaN is not equal to itself
    changed = [name for name in new if repr(old.get(name)) != repr(new[name])]
    changes = [f"{name} was {old.get(name)}, is {new[name]}" for name in changed]
    old, new = before["inputs"], now["inputs"]
    changes += [f"{file} has changed" for file in new if file in old and old[file] != new[file]]
    changes += [f"{file} is new" for file in new if file not in old]
    return changes + [f"{file} is left out" for file in old if file not in new]


@contextmanager
def work_folder(out: Path, shared: bool) -> Iterator[WorkFolder]:
    """The folder beside `out` in which it grows. It stays when the block fails, for the next run to go on, unless
    it was made here and no shard is finished yet.

    Args: shared: other processes make other parts at the same time, so it always stays.
    Raises: ValueError when the folder cannot be written, or another run works there.
    """
    work = WorkFolder(out.with_name(f".{out.name}.partial"))
    made_here = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work.path.mkdir(exist_ok=True)
        lock = _lock(work, shared)
    except OSError as error:
        raise ValueError(
            f"cannot write {out} ({error.strerror}: {error.filename}); choose a writable folder"
        ) from error
    begun_before = work.record.is_file()
    try:
        yield work
    except OSError as error:
        raise ValueError(
            f"writing {out} failed: {error.strerror or error}; free space there or choose another folder, and run "
            "the same command again to go on"
        ) from error
    finally:
        if not shared and not begun_before and not any(work.data.glob("*/*.index.json")):
            shutil.rmtree(work.path, ignore_errors=True)
            with suppress(OSError):  # not empty: the data set is in place
                for folder in made_here:
                    folder.rmdir()
        os.close(lock)


def _lock(work: WorkFolder, shared: bool) -> int:
    """A lock that ends with this process, however that ends."""
    lock = os.open(work.path / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another run works in {work.path}; wait until it ends, or name another --out") from None
    except OSError:
        pass  # a file system without locks: then runs must not meet
    return lock
