"""Samples of a tar from any writer. Members are grouped by key as in WebDataset, and checked while the tar is read."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from msvae.shards.audit.walk import Member, Span
from msvae.shards.manifest import MAX_SAMPLE_JSON_BYTES, TILE_STEP_PX, Manifest
from msvae.shards.sample_codec import ENDINGS, Compression, decode_any_mask, decompress_into, npy_header

DTYPES = ("uint8", "uint16", "int16", "float32")
HEADER_LOCK = threading.Lock()
"""Lock for NumPy's parser of headers, which is not thread-safe in some versions of Python 3.11 (gh-106905)."""
MAX_MEMBER_BYTES = 2**31
"""Limit of a tile or mask that is read into memory, in bytes."""

_KEY_AND_ENDING = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_MAX_READ_BYTES = dict.fromkeys(("npy", "blosc2", "png"), MAX_MEMBER_BYTES) | {"json": MAX_SAMPLE_JSON_BYTES}


class Endings(NamedTuple):
    """Endings of the tile and mask members, such as `bands.npy`. Empty means the only `.npy` and the only `.png`."""

    bands: str = ""
    mask: str = ""


class TarPart(NamedTuple):
    """A member of a sample and its content, which is None if it was not read."""

    member: Member
    content: bytes | None


@dataclass
class TarSample:
    """Members of a tar that share one key, by ending, in the order of the tar."""

    key: str
    parts: dict[str, TarPart] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    """Endings that occur twice. The first of each is in `parts`."""


class DecodedSample(NamedTuple):
    """A valid sample: tile (C, H, W) in its stored type, leaf mask (H, W), members and checksums."""

    key: str
    tile: NDArray[Any]
    leaf_mask: NDArray[np.bool_]
    bands: Member
    mask: Member
    json: Member | None
    crc32c: int
    """Checksum of the tile member followed by the mask member."""
    json_crc32c: int


def group_members(members: Iterable[Member], span: Span) -> Iterator[TarSample]:
    """Group neighbouring members that share the name up to its first dot.

    Files without a dot and `__NAME__` are skipped, as webdataset does.
    """
    sample: TarSample | None = None
    for member in members:
        match = _KEY_AND_ENDING.fullmatch(member.name)
        if match is None or _SKIPPED.match(member.name):
            continue
        key, ending = match[1], match[2].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = TarSample(key)
        if ending in sample.parts:
            sample.repeated.append(ending)
            continue
        wanted = member.size_bytes <= _MAX_READ_BYTES.get(ending.rsplit(".", 1)[-1], -1)
        sample.parts[ending] = TarPart(member, span(member.offset, member.size_bytes) if wanted else None)
    if sample is not None:
        yield sample


def decode_sample(sample: TarSample, endings: Endings, tile_format: TileFormat) -> DecodedSample:
    """Decode tile and mask of a sample.

    Raises: ValueError with key and fault.
    """
    (bands, npy), (mask, png) = choose_members(sample, endings)
    json_part = sample.parts.get("json")
    json_file, content = (None, b"") if json_part is None else json_part
    if json_file is not None and content is None:
        raise ValueError(
            f"sample {sample.key} has a .json of {json_file.size_bytes:,} bytes, expected at most "
            f"{MAX_SAMPLE_JSON_BYTES:,}; store long content under another ending and write the tar again"
        )
    try:
        tile, leaf_mask = tile_format.tile(npy), tile_format.mask(png)
        if json_file is not None:
            json.loads(content or b"")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"sample {sample.key} has a .json that does not parse ({error}); write it again") from None
    except ValueError as error:
        raise ValueError(f"sample {sample.key} {error}") from None
    checksum = crc32c(png, crc32c(npy))
    return DecodedSample(sample.key, tile, leaf_mask, bands, mask, json_file, checksum, crc32c(content or b""))


def choose_members(sample: TarSample, endings: Endings) -> tuple[tuple[Member, bytes], tuple[Member, bytes]]:
    """Return the tile and mask members and their contents.

    Raises: ValueError with key and endings if a member is missing, occurs twice, or is ambiguous.
    """
    if sample.repeated:
        raise ValueError(
            f"sample {sample.key} has its member {sample.repeated[0]} twice; each sample needs a key of its own, and "
            "keys end at the first dot: rename and write the tar again"
        )
    return (
        _only(sample, "tile", endings.bands, "npy", "--bands-member"),
        _only(sample, "mask", endings.mask, "png", "--mask-member"),
    )


def _only(sample: TarSample, what: str, ending: str, extension: str, option: str) -> tuple[Member, bytes]:
    found = [e for e in sample.parts if e == ending or (not ending and e.rsplit(".", 1)[-1] == extension)]
    if len(found) != 1:
        raise ValueError(
            f"sample {sample.key} has the members {', '.join(sample.parts)}, expected one {ending or '.' + extension} "
            f"as its {what}; its members must be neighbours and keys end at the first dot: write the tar again, or "
            f"choose with {option}"
        )
    member, content = sample.parts[found[0]]
    if content is None:
        raise ValueError(
            f"sample {sample.key} has a {found[0]} of {member.size_bytes:,} bytes for its {what}, expected a "
            f".{extension} of at most {MAX_MEMBER_BYTES:,}"
        )
    return member, content


class TileFormat:
    """Type and shape (C, H, W) that all tiles of a split share."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, int, int], compression: Compression = "none") -> None:
        self.dtype, self.shape, self._compression = dtype, shape, compression
        self._header = npy_header(shape, dtype)
        self._num_bytes = len(self._header) + int(np.prod(shape)) * dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} tiles of shape {self.shape}"

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> TileFormat:
        """Return the format that a manifest states."""
        shape = (len(manifest.bands), manifest.tile_px, manifest.tile_px)
        return cls(np.dtype(manifest.dtype), shape, manifest.compression)

    @property
    def ending(self) -> str:
        """Ending of the tile member. Empty means that any `.npy` may be the tile."""
        return "" if self._compression == "none" else ENDINGS[self._compression]

    @classmethod
    def of_npy(cls, npy: bytes) -> TileFormat:
        """Return the format of a tile, from its `.npy` header.

        Raises: ValueError if tiles of a split cannot have this format.
        """
        dtype, shape = _npy_header(npy)
        num_bands, *sides = shape if len(shape) == 3 else (0, 0, 0)
        if num_bands < 1 or sides[0] != sides[1] or sides[0] < TILE_STEP_PX or sides[0] % TILE_STEP_PX:
            raise ValueError(
                f"holds an array of shape {shape}, expected (bands, side, side) with a side in multiples of "
                f"{TILE_STEP_PX}; write tiles channels first"
            )
        return cls(dtype, (num_bands, sides[0], sides[1]))

    def tile(self, npy: bytes) -> NDArray[Any]:
        """Return the tile (C, H, W) in its stored type. If it is not compressed, it shares the memory of `npy`.

        Raises: ValueError if type or shape differ, or `ShardReader` does not accept the header.
        """
        if self._compression != "none":
            return self._decompressed(npy)
        if not npy.startswith(self._header) or len(npy) != self._num_bytes:
            dtype, shape = _npy_header(npy)
            if (dtype, shape) != (self.dtype, self.shape):
                raise ValueError(f"holds a {dtype} array of shape {shape}, expected {self}; write it again")
            raise ValueError(
                f"has a .npy of {len(npy)} bytes, expected {self._num_bytes} with a header as numpy.save writes it "
                "since 1.23; write it again"
            )
        return np.frombuffer(npy, self.dtype, offset=len(self._header)).reshape(self.shape)

    def _decompressed(self, chunk: bytes) -> NDArray[Any]:
        tile = np.empty(self.shape, self.dtype)
        try:
            decompress_into(bytearray(chunk), tile)
        except ValueError as error:
            raise ValueError(f"{error}, expected one of {self}; write it again") from None
        return tile

    def mask(self, png: bytes) -> NDArray[np.bool_]:
        """Return the leaf mask (H, W).

        Raises: ValueError if it is not a PNG with one grey value per pixel, or has another size.
        """
        try:
            return decode_any_mask(png, self.shape[1:])
        except ValueError as error:
            raise ValueError(f"{error}; write it again as a grey PNG") from None


def _npy_header(npy: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    stream = io.BytesIO(npy)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with HEADER_LOCK:
            shape, fortran_order, dtype = read(stream)
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:
        raise ValueError(f"holds no .npy array ({str(error).splitlines()[0][:80]})") from None
    if dtype.hasobject:
        raise ValueError("holds Python objects, which could run code; write numbers")
    if fortran_order:
        raise ValueError("holds a Fortran-ordered array, expected C order; write numpy.ascontiguousarray(tile)")
    if dtype.byteorder == ">":
        raise ValueError(f"holds big-endian {dtype.name}, expected little endian; write tile.astype('{dtype.name}')")
    if dtype.name not in DTYPES:
        raise ValueError(f"holds {dtype.name}, expected {', '.join(DTYPES)}; write tile.astype(…)")
    return dtype, shape
