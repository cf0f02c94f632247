"""The members of a tar, found by its 512-byte headers alone: strict where `tarfile` would end in silence.

USTAR, GNU and pax; every header's checksum is verified, and the two zero blocks at the end are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK_BYTES = 512
MAX_EXTENSION_BYTES = 2**16
"""Longest name or pax record that is read: names are short, and a header is not to be believed."""

RESTORE = "restore it from its source"

_ZEROS = bytes(BLOCK_BYTES)
_CHECKSUM, _TYPE, _MAGIC = slice(148, 156), slice(156, 157), slice(257, 263)
_BLANK_CHECKSUM_SUM = 8 * ord(" ")
_FILES, _FOLDER, _LINKS = (b"0", b"\0", b"7"), b"5", (b"1", b"2")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL = b"L", b"K", b"x", b"g"

Span = Callable[[int, int], bytes]
"""(offset, length) -> bytes, fewer where the tar ends."""


class Member(NamedTuple):
    """A file in a tar: byte offset and length of its content."""

    name: str
    offset: int
    size_bytes: int


def walk(span: Span, size_bytes: int) -> Iterator[Member]:
    """All files of a tar of this size, in order; `span` is asked for ever larger offsets.

    Raises: ValueError that says where the tar is truncated, altered, or holds what no sample may be made of.
    """
    offset, name, size = 0, None, None
    while True:
        header = span(offset, BLOCK_BYTES)
        if header == _ZEROS:
            _check_end(span, offset, size_bytes)
            return
        _check_header(header, offset)
        kind, content = header[_TYPE], offset + BLOCK_BYTES
        length = _number(header[124:136], offset) if size is None or kind not in _FILES else size
        offset = content + -(-length // BLOCK_BYTES) * BLOCK_BYTES
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL):
            extension = _extension(span, content, length)
            if kind == _LONG_NAME:
                name = _text(extension.rstrip(b"\0"), content)
            elif kind in (_PAX, _PAX_FOR_ALL):
                name, size = _pax(extension, content, name, size, for_all=kind == _PAX_FOR_ALL)
            continue
        if kind in _FILES:
            member = Member(name if name is not None else _name(header, content), content, length)
            if offset > size_bytes:
                raise ValueError(f"truncated in the data of {member.name}: {_ends(size_bytes, offset)}")
            yield member
        elif kind != _FOLDER:
            raise _unknown(kind, name if name is not None else _name(header, content))
        name = size = None


def _check_header(header: bytes, offset: int) -> None:
    if not header:
        raise ValueError(
            f"truncated between two members: it ends at byte {offset:,} without the two blocks of zeros "
            f"that end a tar; {RESTORE}"
        )
    if len(header) < BLOCK_BYTES:
        raise ValueError(f"truncated in a header: {_ends(offset + len(header), offset + BLOCK_BYTES)}")
    if _octal(header[_CHECKSUM]) != sum(header) - sum(header[_CHECKSUM]) + _BLANK_CHECKSUM_SUM:
        raise ValueError(f"the header at byte {offset:,} is altered: its checksum does not fit; {RESTORE}")


def _check_end(span: Span, offset: int, size_bytes: int) -> None:
    if len(span(offset + BLOCK_BYTES, BLOCK_BYTES)) < BLOCK_BYTES:
        raise ValueError(f"truncated in its end: it lacks the second block of zeros after byte {offset:,}; {RESTORE}")
    for start in range(offset + BLOCK_BYTES, size_bytes, MAX_EXTENSION_BYTES):
        if any(span(start, MAX_EXTENSION_BYTES)):
            raise ValueError(
                f"goes on after its end at byte {offset:,}, where every reader stops: tars were joined; write one tar"
            )


def _number(field: bytes, offset: int) -> int:
    """Octal, or base 256 for what does not fit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    number = _octal(field)
    if number is None:
        raise ValueError(f"the header at byte {offset:,} has {field!r} for a size; {RESTORE}")
    return number


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():  # a sign would pass for a number
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _name(header: bytes, content: int) -> str:
    name = _text(header[:100].split(b"\0")[0], content)
    prefix = header[345:500].split(b"\0")[0] if header[_MAGIC] == b"ustar\0" else b""
    return f"{_text(prefix, content)}/{name}" if prefix else name


def _text(name: bytes, content: int) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise ValueError(f"byte {content:,} follows a name that is not UTF-8: {name!r}; rename it") from None


def _extension(span: Span, content: int, length: int) -> bytes:
    if length > MAX_EXTENSION_BYTES:
        raise ValueError(f"the header before byte {content:,} asks for a name of {length:,} bytes; {RESTORE}")
    extension = span(content, length)
    if len(extension) < length:
        raise ValueError(f"truncated in a header: {_ends(content + len(extension), content + length)}")
    return extension


def _pax(
    records: bytes, content: int, name: str | None, size: int | None, *, for_all: bool
) -> tuple[str | None, int | None]:
    """Name and size of the next member where pax records (`27 path=leaf.npy\\n`, length first) state them."""
    stated: dict[bytes, bytes] = {}
    rest = records.rstrip(b"\0")
    while rest:
        digits, _, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        keyword, equals, value = rest[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n") or length > len(rest):
            raise ValueError(f"the pax header at byte {content:,} is altered; {RESTORE}")
        stated[keyword], rest = value[:-1], rest[length:]
    if any(keyword.startswith(b"GNU.sparse") for keyword in stated):
        raise ValueError(f"the pax header at byte {content:,} is of a sparse file; write the tar without --sparse")
    if for_all and stated.keys() & {b"path", b"size"}:
        raise ValueError(f"the pax header at byte {content:,} gives all members one name or size; write the tar again")
    if b"path" in stated:
        name = _text(stated[b"path"], content)
    if b"size" in stated:
        if not stated[b"size"].isdigit():
            raise ValueError(f"the pax header at byte {content:,} has {stated[b'size']!r} for a size; {RESTORE}")
        size = int(stated[b"size"])
    return name, size


def _unknown(kind: bytes, name: str) -> ValueError:
    if kind in _LINKS:
        return ValueError(f"{name} is a link, which loaders skip; write the tar with --dereference --hard-dereference")
    return ValueError(f"{name} is of tar type {kind!r}, expected files; write the tar without --sparse or devices")


def _ends(got: int, expected: int) -> str:
    return f"it ends at byte {got:,}, expected {expected:,} or more; {RESTORE}"
