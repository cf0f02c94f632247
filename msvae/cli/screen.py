"""What every command shows alike: errors and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def user_errors() -> Iterator[None]:
    """What is wrong with the input is one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        Console(stderr=True, highlight=False, markup=False).print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def progress(what: str, *, is_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; of bytes with their rate."""
    console = Console(stderr=True)
    counts = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn(what), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def numbers(option: str, text: str) -> tuple[float, ...] | None:
    """Numbers separated by commas; None for no text."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        raise ValueError(f"{option} is {text!r}, expected numbers such as 475,560,668") from None
