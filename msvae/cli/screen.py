"""Messages, errors, progress bars and lists of numbers, the same for every command."""

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
    """Column of a progress bar with the number of items per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Return the rate, such as `412 tiles/s`."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} {self._unit}/s")


def say(text: str, *, stderr: bool = False) -> None:
    """Print a message on one line. On a terminal, break it only between words, so that a path can be copied whole."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if console.is_terminal:
        text = textwrap.fill(
            text, console.width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
        )
    console.print(text, soft_wrap=True)


@contextmanager
def user_errors(when_stopped: str = "stopped") -> Iterator[None]:
    """Print errors of input and files on one line, and exit with code 2.

    On Ctrl-C, print `when_stopped` and exit with code 130.
    """
    try:
        yield
    except ValueError as error:
        say(f"error: {error}", stderr=True)
        raise typer.Exit(2) from None
    except BrokenPipeError:  # the reader, such as `| head`, has ended
        raise
    except OSError as error:
        what = error.strerror or str(error).splitlines()[0]
        if error.errno == errno.ENOSPC:
            what += f" ({error.filename or tempfile.gettempdir()}); free space there"
        elif error.filename:
            what += f": {error.filename}; check this path and its permissions"
        say(f"error: {what}", stderr=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say(when_stopped, stderr=True)
        raise typer.Exit(130) from None


@contextmanager
def progress(what: str, *, is_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar with rate and remaining time on a terminal, and nothing elsewhere.

    Yields a function of the number of finished items and the number of all items.
    """
    console = Console(stderr=True)
    counts = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(), RateColumn(what))
    columns = (TextColumn(what), BarColumn(), *counts, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def numbers(option: str, text: str) -> tuple[float, ...] | None:
    """Parse numbers separated by commas; None for an empty text.

    Raises: ValueError if a part is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        raise ValueError(f"{option} is {text!r}, expected numbers such as 475,560,668") from None
