"""What every command shows alike: errors and progress."""

from __future__ import annotations

import errno
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


class RateColumn(ProgressColumn):
    """How many a second."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def render(self, task: Task) -> Text:
        """Such as `412 tiles/s`."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} {self._what}/s")


def say(text: str, *, stderr: bool = False) -> None:
    """A message in one line; on a terminal broken between words, so that a path can be copied whole."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if console.is_terminal:
        text = textwrap.fill(
            text, console.width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
        )
    console.print(text, soft_wrap=True)


@contextmanager
def user_errors(when_stopped: str = "stopped") -> Iterator[None]:
    """What is wrong with the input or its place is one line and exit code 2; Ctrl-C says `when_stopped`."""
    try:
        yield
    except ValueError as error:
        say(f"error: {error}", stderr=True)
        raise typer.Exit(2) from None
    except BrokenPipeError:  # of `| head`, which wants no more
        raise
    except OSError as error:
        what = error.strerror or str(error).splitlines()[0]
        if error.errno == errno.ENOSPC:
            what += f" ({error.filename or tempfile.gettempdir()}); free space there"
        elif error.filename:
            what += f": {error.filename}; check that path and your rights to it"
        say(f"error: {what}", stderr=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say(when_stopped, stderr=True)
        raise typer.Exit(130) from None


@contextmanager
def progress(what: str, *, is_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with rate and time left on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    counts = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(), RateColumn(what))
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


def words(text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(filter(None, (word.strip() for word in text.split(","))))
