"""The splits of a dataset, and an overview of the tiles of one split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msvae.shards.leaf_accumulators import COVERAGE_BINS, coverage_bin
from msvae.shards.manifest import MANIFEST_NAME, Manifest, ShardIndex
from msvae.shards.order import evenly_spaced_samples, stored_order
from msvae.shards.reader import ShardReader
from msvae.shards.sample_codec import decode_mask_into
from msvae.shards.stores import open_store
from msvae.shards.stores.store import MissingError, Store

SPLITS = ("train", "val", "test")
COMPRESSED_TARS = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.bz2": "bunzip2",
    ".tar.xz": "unxz",
    ".tar.zst": "unzstd",
}
"""Command that decompresses a tar, by the ending of its name."""
MAX_MASKS = 2000
"""Number of masks that are enough to measure coverage. Each one costs a request if the shards are remote."""
KEY_OF_TILE = re.compile(r"(.+)_r\d+_c\d+")


def find_splits(location: str | Path, *, marker: str = MANIFEST_NAME) -> dict[str, Store]:
    """Find the splits at a location: the location itself, or train/, val/ and test/ inside it.

    Args:
        location: folder or URL.
        marker: name of a file that every split contains, or the ending of such a name if it starts with a dot.
    Returns: the stores by name: train, val, test, or the name of the location itself.
    Raises: ValueError if there is no split.
    """
    alone = open_store(location)
    if _contains(alone, marker):
        return {_name(alone.location): alone}
    found = {}
    for name in SPLITS:
        store = open_store(f"{str(location).rstrip('/')}/{name}")
        if _contains(store, marker):
            found[name] = store
    if not found:
        what = f"a {marker}" if marker == MANIFEST_NAME else f"{marker} files"
        raise ValueError(
            f"neither {location} nor {', '.join(SPLITS)} inside it holds {what}; make shards with `msvae pack`, or "
            "index existing tars with `msvae index`"
        )
    return found


def splits_to_make(location: str | Path) -> dict[str, Store]:
    """Find the splits from which new splits are made, by the names of the new splits.

    A single split that is not called val or test becomes train.
    Raises: ValueError if there is no split.
    """
    return {name if name in SPLITS else SPLITS[0]: store for name, store in find_splits(location).items()}


def find_tars(location: str) -> dict[str, Store]:
    """Find the splits that hold tars, by name.

    Raises: ValueError if there is none, or if a tar is compressed and would be ignored.
    """
    inside = [f"{location.rstrip('/')}/{name}" for name in SPLITS]
    try:
        stores = find_splits(location, marker=".tar")
    except ValueError:
        _refuse_compressed([location, *inside])
        raise
    alone = any(store.location.rstrip("/") == location.rstrip("/") for store in stores.values())
    _refuse_compressed([location] if alone else inside)
    return stores


@dataclass(frozen=True)
class Coverage:
    """Leaf pixels and histogram of coverage (ten equal bins from 0 to 1) of the tiles that were read."""

    num_tiles: int
    leaf_pixels: int
    histogram: list[int]


def measure_coverage(store: Store, manifest: Manifest) -> Coverage:
    """Measure coverage from the masks alone: of all tiles, or of 2,000 that are evenly spaced.

    Raises: ValueError with shard and key if a mask is missing or damaged.
    """
    names = manifest.shards.name

    @lru_cache(maxsize=2)
    def index_of(shard: int) -> ShardIndex:
        return ShardIndex.load(store, manifest.shards[shard])

    samples = evenly_spaced_samples(manifest.shards.num_samples, MAX_MASKS)
    histogram, leaf_pixels = [0] * COVERAGE_BINS, 0
    leaf_HW = np.empty((manifest.tile_px, manifest.tile_px), np.bool_)
    for shard, row, _ in samples:
        index = index_of(shard)
        png = store.read_span(names[shard], index.mask_offset[row], index.mask_bytes[row])
        try:
            decode_mask_into(png, leaf_HW)
        except ValueError as error:
            raise ValueError(
                f"{store.location}/{names[shard]}: sample {index.keys[row]} {error}; pack this split again"
            ) from None
        num_leaf = int(leaf_HW.sum())
        leaf_pixels += num_leaf
        histogram[coverage_bin(num_leaf, leaf_HW.size)] += 1
    return Coverage(len(samples), leaf_pixels, histogram)


def reflectance_tiles(reader: ShardReader, count: int) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.bool_]]]:
    """Yield key, reflectance (C, H, W) and leaf mask (H, W) of at most `count` tiles, evenly spaced over a split."""
    scale, offset = (
        np.array(values, np.float32)[:, None, None] for values in (reader.manifest.scale, reader.manifest.offset)
    )
    for shard, row, _ in evenly_spaced_samples(reader.samples_per_shard, count):
        stored_CHW, leaf_HW = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], np.bool_)
        key = reader.read_into(shard, row, stored_CHW, leaf_HW)
        yield key, stored_CHW * scale + offset, leaf_HW


class TileOrigin(NamedTuple):
    """Key of a tile, its image, and its group, which stays in one split. Without a group, it is the image."""

    key: str
    image: str
    group: str


def tile_origins(reader: ShardReader) -> list[TileOrigin]:
    """Return the origin of every tile in stored order, from its key and its JSON alone.

    The image is the key before its last `_rROW_cCOLUMN`. For keys of another form it is the `source` in the JSON, or
    the key itself.
    """
    with ThreadPoolExecutor(max(1, reader.store.parallel_reads), "msvae-request") as pool:
        return list(
            pool.map(
                lambda sample: _origin(
                    reader.key(sample.shard, sample.row), reader.json_object(sample.shard, sample.row)
                ),
                stored_order(reader.samples_per_shard),
            )
        )


def _origin(key: str, json_object: Mapping[str, Any]) -> TileOrigin:
    match, source = KEY_OF_TILE.fullmatch(key), json_object.get("source")
    if match is not None:
        image = match[1]
    elif isinstance(source, list):
        image = ", ".join(map(str, source)) or key
    else:
        image = str(source or key)
    return TileOrigin(key, image, str(json_object.get("group") or image))


def _refuse_compressed(locations: Sequence[str]) -> None:
    for location in locations:
        names: Sequence[str] = ()
        with suppress(MissingError):
            names = open_store(location).names()
        for name in names:
            for ending, command in COMPRESSED_TARS.items():
                if name.endswith(ending):
                    how = f"`{command}`" if "://" in location else f"`{command} {location}/*{ending}`"
                    raise ValueError(
                        f"{location} holds {name}, a compressed tar, which cannot be read at random; decompress it "
                        f"with {how}"
                    )


def _name(location: str) -> str:
    """Return the last part of a folder or URL, also if it is `.` or `..`."""
    path = Path(location)
    return path.resolve().name if path.name in ("", "..") else path.name


def _contains(store: Store, name: str) -> bool:
    try:
        if name.startswith("."):
            return any(file.endswith(name) for file in store.names())
        return store.size_bytes(name) > 0
    except MissingError:
        return False
