"""Shards: their plan, and the tasks that write them. A shard depends only on its plan and the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.files import replace_file
from msvae.packing.splits import SplitTiles
from msvae.packing.tiling import Tile
from msvae.packing.workers import OnTiles, PackJob
from msvae.shards.leaf_accumulators import COVERAGE_BINS, LeafValues, coverage_bin
from msvae.shards.manifest import Manifest, Shards
from msvae.shards.splits import SPLITS
from msvae.shards.writer import ShardWriter, is_complete, shard_entry
from msvae.work_folder import WorkFolder

STATISTICS = "statistics"
"""Folder inside the work folder, with the leaf values of every training shard."""


@dataclass(frozen=True)
class ShardPlan:
    """The tiles of one shard and the group of each tile."""

    split: str
    name: str
    tiles: tuple[Tile, ...]
    groups: tuple[str, ...]

    def tar(self, work: WorkFolder) -> Path:
        """Return the path of the shard in the work folder."""
        return work.data / self.split / self.name

    def leaf_values(self, work: WorkFolder) -> Path:
        """Return the path of the leaf values of a training shard. It is written before the shard is in place."""
        return work.path / STATISTICS / f"{self.name}.npz"

    def is_done(self, work: WorkFolder) -> bool:
        """Return True if the shard is complete."""
        return is_complete(self.tar(work))


def plan_shards(splits: SplitTiles, tiles_per_shard: int) -> list[ShardPlan]:
    """Return the plans of all shards of all splits, in order."""
    plans = []
    for split, tiles in splits.tiles.items():
        for number, start in enumerate(range(0, len(tiles), tiles_per_shard)):
            chosen = tuple(tiles[start : start + tiles_per_shard])
            groups = tuple(splits.group_of[tile] for tile in chosen)
            plans.append(ShardPlan(split, f"leaf-{number:06d}.tar", chosen, groups))
    return plans


def write_shard(job: PackJob, plan: ShardPlan, on_tiles: OnTiles) -> None:
    """Write a shard, its index and, for a training shard, its leaf values. A finished shard is skipped."""
    if plan.is_done(job.work):
        return on_tiles(len(plan.tiles))
    pixel_format = job.image_set.pixel_format
    values = LeafValues(pixel_format.dtype, pixel_format.scale, pixel_format.offset)
    with ShardWriter(plan.tar(job.work), job.options.compression) as writer:
        for key, stored_CHW, leaf_HW, about in _samples(job, plan):
            writer.write(key, stored_CHW, leaf_HW, about)
            if plan.split == SPLITS[0]:
                values.add(stored_CHW, leaf_HW)
            on_tiles(1)
        if plan.split == SPLITS[0]:
            with replace_file(plan.leaf_values(job.work)) as partial:
                values.save(partial)


def write_manifests(job: PackJob, plans: Sequence[ShardPlan]) -> dict[str, Manifest]:
    """Write the manifest of every split that has shards, from the finished shards, and return the manifests."""
    pixel_format, tile_px = job.image_set.pixel_format, job.options.tile_px
    values = LeafValues(pixel_format.dtype, pixel_format.scale, pixel_format.offset)
    training = [plan for plan in plans if plan.split == SPLITS[0]]
    for plan in training:
        values.join_saved(plan.leaf_values(job.work))
    bins = [coverage_bin(tile.leaf_pixels, tile_px**2) for plan in training for tile in plan.tiles]
    statistics = values.result(np.bincount(bins, minlength=COVERAGE_BINS).tolist())
    manifests = {}
    for split in dict.fromkeys(plan.split for plan in plans):
        manifests[split] = Manifest(
            band_names=list(pixel_format.bands.names),
            wavelengths_nm=list(pixel_format.bands.wavelengths_nm),
            dtype=pixel_format.dtype,
            tile_px=tile_px,
            scale=list(pixel_format.scale),
            offset=list(pixel_format.offset),
            compression=job.options.compression,
            statistics=statistics,
            shards=Shards.of(shard_entry(plan.tar(job.work)) for plan in plans if plan.split == split),
        )
        manifests[split].save(job.work.data / split)
    return manifests


def _samples(job: PackJob, plan: ShardPlan) -> Iterator[tuple[str, NDArray[Any], NDArray[np.bool_], dict[str, Any]]]:
    """Iterate over the samples of a shard: key, stored tile (C, H, W), leaf mask (H, W), metadata."""
    tile_px = job.options.tile_px
    pairs = zip(plan.tiles, plan.groups, strict=True)
    for index, pairs_of_image in groupby(pairs, key=lambda pair: pair[0].image):
        source = job.image_set.images[index].source
        with job.image_set.open(index) as image:
            for tile, group in pairs_of_image:
                stored_CHW, leaf_HW = image.read(tile.row, tile.col, tile_px, tile_px)
                about = {
                    "source": source.file_names,
                    "window": [tile.row, tile.col, tile_px, tile_px],
                    "coverage": tile.leaf_pixels / tile_px**2,
                    "group": group,
                    **image.raster.window_georeference(tile.row, tile.col),
                }
                yield f"{source.name}_r{tile.row:05d}_c{tile.col:05d}", stored_CHW, leaf_HW, about
