"""The samples in a tar that anyone wrote: members grouped by key as WebDataset does, read as the tar is walked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from msvae.shards.audit.tile_format import TileFormat
from msvae.shards.audit.walk import Member, Span
from msvae.shards.manifest import MAX_SAMPLE_JSON_BYTES

MAX_MEMBER_BYTES = 2**31
"""Longest tile or mask that is read into memory."""

_KEY_AND_ENDING = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_MAX_READ_BYTES = dict.fromkeys(("npy", "blosc2", "png"), MAX_MEMBER_BYTES) | {"json": MAX_SAMPLE_JSON_BYTES}


class Endings(NamedTuple):
    """Which member of a sample is which, such as `bands.npy`; empty for the only `.npy` and the only `.png`."""

    bands: str = ""
    mask: str = ""


class Part(NamedTuple):
    """A member of a sample and its content; None for what is not read."""

    member: Member
    content: bytes | None


@dataclass
class Sample:
    """Members of one key by ending, in the order of the tar."""

    key: str
    parts: dict[str, Part] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    """Endings that came twice; the first of each is in `parts`."""


class Decoded(NamedTuple):
    """A sound sample: tile (C, H, W) in stored type, leaf mask (H, W), members, checksums."""

    key: str
    tile: NDArray[Any]
    leaf_mask: NDArray[np.bool_]
    bands: Member
    mask: Member
    json: Member | None
    crc32c: int
    """Of tile and mask."""
    json_crc32c: int


def group(members: Iterable[Member], span: Span) -> Iterator[Sample]:
    """Samples: neighbours that share the name up to its first dot. Other files and `__NAME__` are skipped."""
    sample: Sample | None = None
    for member in members:
        match = _KEY_AND_ENDING.fullmatch(member.name)
        if match is None or _SKIPPED.match(member.name):
            continue
        key, ending = match[1], match[2].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        if ending in sample.parts:
            sample.repeated.append(ending)
            continue
        wanted = member.size_bytes <= _MAX_READ_BYTES.get(ending.rsplit(".", 1)[-1], -1)
        sample.parts[ending] = Part(member, span(member.offset, member.size_bytes) if wanted else None)
    if sample is not None:
        yield sample


def decode(sample: Sample, endings: Endings, tile_format: TileFormat) -> Decoded:
    """Tile and mask of a sample.

    Raises: ValueError naming key and fault.
    """
    (bands, npy), (mask, png) = choose(sample, endings)
    json_part = sample.parts.get("json")
    about, content = (None, b"") if json_part is None else json_part
    if about is not None and content is None:
        raise ValueError(
            f"sample {sample.key} has a .json of {about.size_bytes:,} bytes, expected at most "
            f"{MAX_SAMPLE_JSON_BYTES:,}; give what is long an ending of its own and write the tar again"
        )
    try:
        tile, leaf_mask = tile_format.tile(npy), tile_format.mask(png)
        if about is not None:
            json.loads(content or b"")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"sample {sample.key} has a .json that does not parse ({error}); write it again") from None
    except ValueError as error:
        raise ValueError(f"sample {sample.key} {error}") from None
    checksum = crc32c(png, crc32c(npy))
    return Decoded(sample.key, tile, leaf_mask, bands, mask, about, checksum, crc32c(content or b""))


def choose(sample: Sample, endings: Endings) -> tuple[tuple[Member, bytes], tuple[Member, bytes]]:
    """Tile and mask members and their contents.

    Raises: ValueError naming key and endings when one is missing, comes twice, or cannot be told.
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


def _only(sample: Sample, what: str, ending: str, extension: str, option: str) -> tuple[Member, bytes]:
    found = [e for e in sample.parts if e == ending or (not ending and e.rsplit(".", 1)[-1] == extension)]
    if len(found) != 1:
        raise ValueError(
            f"sample {sample.key} has the members {', '.join(sample.parts)}, expected one {ending or '.' + extension} "
            f"as its {what}; its members must stand together and keys end at the first dot: write the tar again, or "
            f"choose with {option}"
        )
    member, content = sample.parts[found[0]]
    if content is None:
        raise ValueError(
            f"sample {sample.key} has a {found[0]} of {member.size_bytes:,} bytes for its {what}, expected a "
            f".{extension} of at most {MAX_MEMBER_BYTES:,}"
        )
    return member, content
