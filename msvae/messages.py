"""Counts in messages, and the type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Function that is called with the number of finished items and the number of all items."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as `1 tile` or `1,024 tiles`. Pass `plural` if it is not the noun plus s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
