"""What a split holds, from its manifest and from some of its tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from msvae.shards.audit.tile_format import TileFormat
from msvae.shards.leaf_counts import COVERAGE_BINS, coverage_bin
from msvae.shards.manifest import Manifest, ShardIndex
from msvae.shards.reader import ShardReader
from msvae.shards.stores.store import Store

MAX_MASKS = 2000
"""More tell nothing new of the coverage, and each is a request where shards lie behind a URL."""


@dataclass(frozen=True)
class Coverage:
    """Leaf pixels and tiles by coverage, in ten equal bins from 0 to 1, of as many tiles as were looked at."""

    num_tiles: int
    leaf_pixels: int
    histogram: list[int]


def places_in_even_steps(samples_per_shard: list[int], count: int) -> list[tuple[int, int]]:
    """(shard, row) of at most `count` samples, in stored order and in even steps over a split."""
    ends = np.cumsum(samples_per_shard)
    total = int(ends[-1])
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
    shards = np.searchsorted(ends, chosen, side="right")
    rows = chosen - np.concatenate([[0], ends])[shards]
    return [(int(shard), int(row)) for shard, row in zip(shards, rows, strict=True)]


def measure_coverage(store: Store, manifest: Manifest) -> Coverage:
    """Coverage from the masks alone: of all tiles, or of 2,000 in even steps.

    Raises: ValueError naming what is missing or no mask.
    """
    tile_format = TileFormat.of_manifest(manifest)
    names = manifest.shards.name

    @lru_cache(maxsize=2)
    def index_of(shard: int) -> ShardIndex:
        return ShardIndex.load(store, manifest.shards[shard])

    places = places_in_even_steps(manifest.shards.num_samples, MAX_MASKS)
    histogram, leaf_pixels = [0] * COVERAGE_BINS, 0
    for shard, row in places:
        index = index_of(shard)
        png = store.read_span(names[shard], index.mask_offset[row], index.mask_bytes[row])
        try:
            leaf_mask = tile_format.mask(png)
        except ValueError as error:
            raise ValueError(f"{store.location}/{names[shard]}: sample {index.keys[row]} {error}") from None
        num_leaf = int(leaf_mask.sum())
        leaf_pixels += num_leaf
        histogram[coverage_bin(num_leaf, leaf_mask.size)] += 1
    return Coverage(len(places), leaf_pixels, histogram)


def reflectance_tiles(reader: ShardReader, count: int) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.bool_]]]:
    """Key, reflectance (C, H, W) and leaf mask (H, W) of at most `count` tiles in even steps over a split."""
    scale, offset = (
        np.array(values, np.float32)[:, None, None] for values in (reader.manifest.scale, reader.manifest.offset)
    )
    for shard, row in places_in_even_steps(reader.samples_per_shard, count):
        stored, leaf_mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], np.bool_)
        key = reader.read_into(shard, row, stored, leaf_mask)
        yield key, stored * scale + offset, leaf_mask
