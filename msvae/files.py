"""Atomic writing: a file or folder has its final name only if it is complete, even if the process is killed."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Return a hidden name in the same folder that no other process uses, for a file that is still being written."""
    return path.with_name(f".{socket.gethostname()}-{os.getpid()}-{path.name}")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a hidden name to write to. It becomes `path` when the block ends and is removed when the block raises."""
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):  # the error that ended the block is more useful than this one
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, complete or not at all. Several processes may write the same file at once."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replace_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder next to `out`. It replaces `out` when the block ends and is removed when the block raises.

    Raises: ValueError if the folder cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    new_parents = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise ValueError(
            f"cannot write {out} ({error.strerror}: {error.filename}); choose a writable folder"
        ) from error
    try:
        yield partial
        move_folder(partial, out)
    except OSError as error:
        raise ValueError(
            f"writing {out} failed: {error.strerror or error}; free space there or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # the parents are not empty once `out` exists
            for folder in new_parents:
                folder.rmdir()


def move_folder(complete: Path, out: Path) -> None:
    """Flush a complete folder to disk, then rename it to `out`, which it replaces."""
    for path in (*complete.iterdir(), complete):
        _flush_to_disk(path)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    try:
        complete.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    _flush_to_disk(out.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replace_files(out: Path, last: str) -> Iterator[Path]:
    """Yield a new folder whose files replace those of the same names in `out`, `last` after all others.

    Other files in `out` stay. Nothing changes when the block raises.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
        new = Path(folder)
        yield new
        files = [path.relative_to(new) for path in sorted(new.rglob("*")) if path.is_file()]
        for file in sorted(files, key=lambda file: file == Path(last)):
            (out / file).parent.mkdir(exist_ok=True)
            (new / file).replace(out / file)


def remove_abandoned(path: Path) -> None:
    """Remove partial files of `path` that killed processes of this machine left behind."""
    before, after = f".{socket.gethostname()}-", f"-{path.name}"
    for partial in path.parent.glob(f"{glob.escape(before)}*{glob.escape(after)}"):
        process = partial.name.removeprefix(before).removesuffix(after)
        if process.isdecimal() and not _is_running(int(process)):
            partial.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
