"""Find the members of a tar from its 512-byte headers, and hash the tar while it is read.

Supported are USTAR, GNU and pax. The checksum of every header is verified, and the two zero blocks at the end are
required. `tarfile` is not used because it ends without an error at damaged headers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from msvae.shards.stores.store import Store

BLOCK_BYTES = 512
CHUNK_BYTES = 2**23
"""Size of one read: large enough for the latency of an object store, small enough for one chunk per thread."""
MAX_EXTENSION_BYTES = 2**16
"""Limit of a name or pax record in bytes. A damaged header may state any length."""

RESTORE = "restore it from its source"

_ZEROS = bytes(BLOCK_BYTES)
_CHECKSUM, _TYPE, _MAGIC = slice(148, 156), slice(156, 157), slice(257, 263)
_BLANK_CHECKSUM_SUM = 8 * ord(" ")
_FILES, _FOLDER, _LINKS = (b"0", b"\0", b"7"), b"5", (b"1", b"2")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL = b"L", b"K", b"x", b"g"

Span = Callable[[int, int], bytes]
"""(offset, length) -> bytes, fewer if the tar ends."""


class Member(NamedTuple):
    """A file in a tar: name, byte offset and length of its content."""

    name: str
    offset: int
    size_bytes: int


class HashedStream:
    """One file that is read once from start to end, and hashed. At most two chunks, or one span, are in memory."""

    def __init__(self, store: Store, name: str, on_read: Callable[[int], None] | None = None) -> None:
        self._store, self._name, self._on_read = store, name, on_read
        self._sha256 = hashlib.sha256()
        self._held = bytearray()
        self._start = 0

    def span(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer if the file ends. Offsets never decrease."""
        assert offset >= self._start, (offset, self._start)
        self._forget(offset)
        while self._end < offset + length and self._read():
            self._forget(offset)
        return bytes(memoryview(self._held)[offset - self._start :][:length]) if offset < self._end else b""

    def sha256(self) -> str:
        """Read the rest of the file. Returns: the SHA-256 of the whole file."""
        while self._read():
            self._forget(self._end)
        return self._sha256.hexdigest()

    @property
    def _end(self) -> int:
        return self._start + len(self._held)

    def _read(self) -> bool:
        chunk = self._store.read_span(self._name, self._end, CHUNK_BYTES)
        self._sha256.update(chunk)
        self._held += chunk
        if self._on_read is not None:
            self._on_read(len(chunk))
        return bool(chunk)

    def _forget(self, offset: int) -> None:
        forgotten = min(offset, self._end) - self._start
        del self._held[:forgotten]
        self._start += forgotten


def walk(span: Span, size_bytes: int) -> Iterator[Member]:
    """Yield all files of a tar in order. The offsets of calls to `span` never decrease.

    Args:
        span: function that reads part of the tar.
        size_bytes: size of the tar.
    Raises: ValueError with the position if the tar is truncated, altered, or holds links, devices or sparse files.
    """
    offset, name, size = 0, None, None
    while True:
        header = span(offset, BLOCK_BYTES)
        if header == _ZEROS:
            _check_end(span, offset, size_bytes)
            return
        _check_header(header, offset)
        kind, data_start = header[_TYPE], offset + BLOCK_BYTES
        length = _number(header[124:136], offset) if size is None or kind not in _FILES else size
        offset = data_start + -(-length // BLOCK_BYTES) * BLOCK_BYTES
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_FOR_ALL):
            extension = _extension(span, data_start, length)
            if kind == _LONG_NAME:
                name = _text(extension.rstrip(b"\0"), data_start)
            elif kind in (_PAX, _PAX_FOR_ALL):
                name, size = _pax(extension, data_start, name, size, for_all=kind == _PAX_FOR_ALL)
            continue
        if kind in _FILES:
            member = Member(name if name is not None else _name(header, data_start), data_start, length)
            if offset > size_bytes:
                raise ValueError(f"truncated in the data of {member.name}: {_ends(size_bytes, offset)}")
            yield member
        elif kind != _FOLDER:
            raise _unknown(kind, name if name is not None else _name(header, data_start))
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
        raise ValueError(f"truncated at its end: it lacks the second block of zeros after byte {offset:,}; {RESTORE}")
    for start in range(offset + BLOCK_BYTES, size_bytes, MAX_EXTENSION_BYTES):
        if any(span(start, MAX_EXTENSION_BYTES)):
            raise ValueError(
                f"continues after its end at byte {offset:,}, where readers stop: tars were joined; write one tar"
            )


def _number(field: bytes, offset: int) -> int:
    """Return the number in a field, which is octal, or base 256 if it is too large for octal digits."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    number = _octal(field)
    if number is None:
        raise ValueError(f"the header at byte {offset:,} has the size {field!r}, expected a number; {RESTORE}")
    return number


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():  # int() would accept a sign
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _name(header: bytes, data_start: int) -> str:
    name = _text(header[:100].split(b"\0")[0], data_start)
    prefix = header[345:500].split(b"\0")[0] if header[_MAGIC] == b"ustar\0" else b""
    return f"{_text(prefix, data_start)}/{name}" if prefix else name


def _text(name: bytes, data_start: int) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise ValueError(f"byte {data_start:,} follows a name that is not UTF-8: {name!r}; rename it") from None


def _extension(span: Span, data_start: int, length: int) -> bytes:
    if length > MAX_EXTENSION_BYTES:
        raise ValueError(f"the header before byte {data_start:,} states a name of {length:,} bytes; {RESTORE}")
    extension = span(data_start, length)
    if len(extension) < length:
        raise ValueError(f"truncated in a header: {_ends(data_start + len(extension), data_start + length)}")
    return extension


def _pax(
    records: bytes, data_start: int, name: str | None, size: int | None, *, for_all: bool
) -> tuple[str | None, int | None]:
    """Return name and size of the next member, replaced by those in pax records such as `27 path=leaf.npy\\n`."""
    stated: dict[bytes, bytes] = {}
    rest = records.rstrip(b"\0")
    while rest:
        digits, _, _ = rest.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        keyword, equals, value = rest[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n") or length > len(rest):
            raise ValueError(f"the pax header at byte {data_start:,} is altered; {RESTORE}")
        stated[keyword], rest = value[:-1], rest[length:]
    if any(keyword.startswith(b"GNU.sparse") for keyword in stated):
        raise ValueError(f"the pax header at byte {data_start:,} is of a sparse file; write the tar without --sparse")
    if for_all and stated.keys() & {b"path", b"size"}:
        raise ValueError(
            f"the pax header at byte {data_start:,} states one name or size for all members; write the tar again"
        )
    if b"path" in stated:
        name = _text(stated[b"path"], data_start)
    if b"size" in stated:
        if not stated[b"size"].isdigit():
            raise ValueError(
                f"the pax header at byte {data_start:,} has the size {stated[b'size']!r}, expected a number; {RESTORE}"
            )
        size = int(stated[b"size"])
    return name, size


def _unknown(kind: bytes, name: str) -> ValueError:
    if kind in _LINKS:
        return ValueError(
            f"{name} is a link, and loaders skip links; write the tar with --dereference --hard-dereference"
        )
    return ValueError(f"{name} is of tar type {kind!r}, expected files; write the tar without --sparse or devices")


def _ends(got: int, expected: int) -> str:
    return f"it ends at byte {got:,}, expected {expected:,} or more; {RESTORE}"
