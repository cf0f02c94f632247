"""How numbers are put into messages."""

from __future__ import annotations


def counted(number: int, thing: str, things: str | None = None) -> str:
    """`1 tile`, `1,024 tiles`; `things` where the plural takes more than an s."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
