"""The second pass: each shard is made by one process, from the plan and the images alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.files import replace_file
from msvae.packing.options import SPLITS
from msvae.packing.splits import SplitTiles
from msvae.packing.tiling import Tile
from msvae.rasters.images import DataSet
from msvae.shards.leaf_accumulators import LeafValues
from msvae.shards.manifest import index_name
from msvae.shards.writer import ShardWriter
from msvae.work_folder import WorkFolder


@dataclass(frozen=True)
class ShardJob:
    """The tiles of one shard and the groups they belong to."""

    split: str
    name: str
    tiles: tuple[Tile, ...]
    groups: tuple[str, ...]

    def tar(self, work: WorkFolder) -> Path:
        """Where the shard is made."""
        return work.data / self.split / self.name

    def is_done(self, work: WorkFolder) -> bool:
        """Whether shard and index are in place; the index comes last."""
        tar = self.tar(work)
        return tar.is_file() and (tar.parent / index_name(tar.name)).is_file()


def plan_shards(splits: SplitTiles, tiles_per_shard: int) -> list[ShardJob]:
    """All shards of all splits, in their order."""
    jobs = []
    for split, tiles in splits.tiles.items():
        for number, start in enumerate(range(0, len(tiles), tiles_per_shard)):
            chosen = tuple(tiles[start : start + tiles_per_shard])
            groups = tuple(splits.group_of[tile] for tile in chosen)
            jobs.append(ShardJob(split, f"leaf-{number:06d}.tar", chosen, groups))
    return jobs


def write_shard(data_set: DataSet, work: WorkFolder, job: ShardJob, count: Callable[[int], None]) -> None:
    """Read the tiles of a shard again and write it, its index, and for training what its leaf pixels are."""
    if job.is_done(work):
        return count(len(job.tiles))
    layout = data_set.layout
    values = LeafValues(layout.dtype, layout.scale, layout.offset) if job.split == SPLITS[0] else None
    with ShardWriter(job.tar(work), data_set.options.compression) as writer:
        for key, stored_CHW, leaf_HW, about in _samples(data_set, job.tiles, job.groups):
            writer.write(key, stored_CHW, leaf_HW, about)
            if values is not None:
                values.add(stored_CHW, leaf_HW)
            count(1)
        if values is not None:  # before the shard is in place: with it these are complete
            with replace_file(work.statistics(job.name)) as partial:
                values.save(partial)


def _samples(
    data_set: DataSet, tiles: Sequence[Tile], groups: Sequence[str]
) -> Iterator[tuple[str, NDArray[Any], NDArray[np.bool_], dict[str, Any]]]:
    """Key, stored tile (C, H, W), leaf mask (H, W) and what is known about them."""
    size_px = data_set.options.tile_px
    pairs = zip(tiles, groups, strict=True)
    for index, of_image in groupby(pairs, key=lambda pair: pair[0].image):
        source = data_set.images[index].source
        with data_set.open(index) as opened:
            for tile, group in of_image:
                stored_CHW, leaf_HW = opened.read(tile.row, tile.col, size_px, size_px)
                about = {
                    "source": source.file_names,
                    "window": [tile.row, tile.col, size_px, size_px],
                    "coverage": tile.leaf_pixels / size_px**2,
                    "group": group,
                    **opened.raster.place(tile.row, tile.col),
                }
                yield f"{source.name}_r{tile.row:05d}_c{tile.col:05d}", stored_CHW, leaf_HW, about
