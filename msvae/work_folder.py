"""The work folder: a hidden folder next to the output, in which a dataset is made, and a killed run resumes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msvae.files import partial_path

MAX_CHANGES_SHOWN = 5


@dataclass(frozen=True)
class WorkFolder:
    """`.OUT.partial`: everything that has been made so far. A file that has its final name is complete."""

    path: Path

    @property
    def data(self) -> Path:
        """The folder that becomes the output."""
        return self.path / "data"

    @property
    def record(self) -> Path:
        """Options and inputs of the run that was started here."""
        return self.path / "record.json"

    def begin(self, record: dict[str, Any], folders: Sequence[str]) -> None:
        """Start a run, or resume the run that was started here, and create `data` and the other `folders`.

        Args: record: `options` and `inputs`, everything that determines the output.
        Raises: ValueError if the earlier run had other options or inputs.
        """
        partial = partial_path(self.record)
        partial.write_text(json.dumps(record))
        try:  # if several parts start at once, exactly one creates the record, and each compares its own with it
            os.link(partial, self.record)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links: parts must not start at the same instant there
            if not self.record.exists():
                partial.replace(self.record)
        partial.unlink(missing_ok=True)
        changes = _changes(json.loads(self.record.read_text()), json.loads(json.dumps(record)))
        if changes:
            more = f" and {len(changes) - MAX_CHANGES_SHOWN} more" if len(changes) > MAX_CHANGES_SHOWN else ""
            raise ValueError(
                f"{self.path} holds unfinished work of other options or inputs "
                f"({'; '.join(changes[:MAX_CHANGES_SHOWN])}{more}); use the same options and inputs "
                "to resume, or delete that folder to start again"
            )
        for folder in ("data", *folders):
            (self.path / folder).mkdir(exist_ok=True)


@contextmanager
def work_folder(out: Path, shared: bool) -> Iterator[WorkFolder]:
    """Yield the locked work folder of `out`.

    If the block raises, the folder stays, so that the next run resumes. It is removed only if this run created it and
    has finished no shard.

    Args:
        out: folder of the complete dataset.
        shared: True if other processes make other parts at the same time. The folder then always stays.
    Raises: ValueError if the folder cannot be written, or another run uses it.
    """
    work = WorkFolder(out.with_name(f".{out.name}.partial"))
    new_parents = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work.path.mkdir(exist_ok=True)
        lock = _lock(work, shared)
    except OSError as error:
        raise ValueError(
            f"cannot write {out} ({error.strerror}: {error.filename}); choose a writable folder"
        ) from error
    is_resumed = work.record.is_file()
    try:
        yield work
    except OSError as error:
        raise ValueError(
            f"writing {out} failed: {error.strerror or error}; free space there or choose another folder, and run "
            "the same command again to resume"
        ) from error
    finally:
        if not shared and not is_resumed and not any(work.data.glob("*/*.index.json")):
            shutil.rmtree(work.path, ignore_errors=True)
            with suppress(OSError):  # the parents are not empty if the output is in place
                for folder in new_parents:
                    folder.rmdir()
        os.close(lock)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each option and each input file that has changed."""
    old, new = before["options"], now["options"]
    # compared as text, because NaN is not equal to itself
    changed = [name for name in new if repr(old.get(name)) != repr(new[name])]
    changes = [f"{name} was {old.get(name)}, is {new[name]}" for name in changed]
    old, new = before["inputs"], now["inputs"]
    changes += [f"{file} has changed" for file in new if file in old and old[file] != new[file]]
    changes += [f"{file} is new" for file in new if file not in old]
    return changes + [f"{file} is left out" for file in old if file not in new]


def _lock(work: WorkFolder, shared: bool) -> int:
    """Lock the folder until this process ends: shared between parts, exclusive for a whole run.

    The filelock package is not used: its FileLock has no shared mode, and its ReadWriteLock keeps an SQLite database
    in a transaction, which SQLite advises against on network file systems, where work folders often are.
    """
    lock = os.open(work.path / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another run uses {work.path}; wait until it ends, or choose another --out") from None
    except OSError:
        pass  # a file system without locks: two runs must not use the folder at once
    return lock
