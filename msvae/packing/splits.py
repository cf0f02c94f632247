"""Assign tiles to train, val and test: plants, images or blocks stay whole, with a gap between splits."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from msvae.packing.options import PackOptions
from msvae.packing.tiling import Tile
from msvae.rasters.sources import ImageSource
from msvae.shards.order import permutation
from msvae.shards.splits import SPLITS

MIN_IMAGES_TO_SPLIT_BY = 3
NUM_BLOCKS = 16
"""Approximate number of blocks by default. Fewer blocks lose fewer tiles to the gap; more mix the splits better."""
MIN_BLOCK_TILES = 2
NUM_TRIALS = 64
"""Number of random assignments of blocks that are tried, to lose few tiles to the gap."""
MAX_TILES_IN_TRIALS = 200_000
"""Limit of the tiles of all trials after the first, added up, so that trials do not take longer than packing."""
TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class SplitTiles:
    """Tiles of each split in their original order, and the group of each tile."""

    tiles: dict[str, list[Tile]]
    group_of: dict[Tile, str]
    split_by: str
    num_in_gap: int
    """Tiles that were dropped because they were too near to another split."""


def group_names(sources: Sequence[ImageSource], group_by: str) -> list[str]:
    """Return the group of each image: the first parenthesised part of the match in its path, else the whole match.

    The part of the path below the folder that all images share is searched first, then the whole path.

    Raises: ValueError if an image does not match.
    """
    pattern, names = re.compile(group_by), []
    shared = Path(os.path.commonpath([source.path.parent for source in sources]))
    for source in sources:
        match = pattern.search(source.path.relative_to(shared).as_posix()) or pattern.search(source.path.as_posix())
        name = match and (match[1] if pattern.groups else match[0])
        if not name:
            raise ValueError(
                f"--group-by {group_by} finds no group in {source.path}; correct the pattern or leave the image out"
            )
        names.append(name)
    return names


def split_tiles(tiles: Sequence[Tile], sources: Sequence[ImageSource], options: PackOptions) -> SplitTiles:
    """Assign tiles to splits, group by group. Tiles of different splits in one image are at least `gap_px` apart.

    Raises: ValueError if no training tile is left, or `group_by` does not match an image.
    """
    split_by = _split_unit(options, tiles)
    groups = _groups(tiles, sources, split_by, options)
    names, group_of_tile = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_of_tile, minlength=len(names)).tolist()
    coordinates = _coordinates(tiles, options)
    best: tuple[int, NDArray[np.int64], NDArray[np.bool_]] | None = None
    num_trials = min(NUM_TRIALS, 1 + MAX_TILES_IN_TRIALS // len(tiles)) if split_by == "block" else 1
    for trial in range(num_trials):
        key = (options.seed, trial) if trial else (options.seed,)
        split_of_tile = np.array(assign_splits(sizes, options.split, *key))[group_of_tile]
        dropped = np.zeros(len(tiles), bool)
        if split_by == "block":
            dropped = _in_gap(split_of_tile, coordinates, options)
        kept = int(np.count_nonzero(~dropped))
        if best is None or kept > best[0]:
            best = kept, split_of_tile, dropped
    assert best is not None
    _, split_of_tile, dropped = best
    if not np.any((split_of_tile == TRAIN) & ~dropped):
        raise ValueError(
            f"no training tile is left: all are nearer than {options.gap_px} px to another split; lower --gap-px, or "
            "split whole images"
        )
    return SplitTiles(
        tiles={
            name: [tiles[i] for i in np.flatnonzero((split_of_tile == split) & ~dropped).tolist()]
            for split, name in enumerate(SPLITS)
        },
        group_of=dict(zip(tiles, groups, strict=True)),
        split_by=split_by,
        num_in_gap=int(np.count_nonzero(dropped)),
    )


def assign_splits(sizes: Sequence[int], shares: Sequence[float], *key: int) -> list[int]:
    """Return the split of each group.

    Groups are shuffled by `key`. Then groups are assigned from the largest to the smallest, each to the split that
    lacks most tiles. Every split with a share above 0 receives at least one group if there are enough groups; if
    there are not, training has priority.
    """
    shuffled = [int(i) for i in permutation(len(sizes), *key)]
    order = sorted(shuffled, key=lambda i: -sizes[i])
    open_splits = [split for split, share in enumerate(shares) if share > 0]
    missing = [share * sum(sizes) for share in shares]
    split_of_group = [0] * len(sizes)
    groups: dict[int, list[int]] = {split: [] for split in open_splits}
    for index in order:
        split = max(open_splits, key=lambda s: missing[s])
        missing[split] -= sizes[index]
        groups[split].append(index)
    for empty in (split for split in open_splits if not groups[split]):
        donor = max(open_splits, key=lambda s: (len(groups[s]) > 1, -missing[s]))
        if len(groups[donor]) < 2 and empty != TRAIN:
            continue
        smallest = groups[donor].pop()
        missing[donor] += sizes[smallest]
        groups[empty].append(smallest)
    for split, members in groups.items():
        for index in members:
            split_of_group[index] = split
    return split_of_group


def _split_unit(options: PackOptions, tiles: Sequence[Tile]) -> str:
    """Return `group`, `image` or `block`; `auto` means `image` if at least three images have leaf."""
    if options.group_by is not None:
        return "group"
    if options.split_by != "auto":
        return options.split_by
    return "image" if len({tile.image for tile in tiles}) >= MIN_IMAGES_TO_SPLIT_BY else "block"


def _groups(tiles: Sequence[Tile], sources: Sequence[ImageSource], split_by: str, options: PackOptions) -> list[str]:
    """Return the name of the group of each tile."""
    if split_by == "group":
        assert options.group_by is not None
        names = group_names(sources, options.group_by)
        return [names[tile.image] for tile in tiles]
    if split_by == "image":
        return [sources[tile.image].name for tile in tiles]
    # squares of the grid that contain a tile: overlapping tiles do not count twice
    squares = {(tile.image, tile.row // options.tile_px, tile.col // options.tile_px) for tile in tiles}
    side = options.block_tiles or max(MIN_BLOCK_TILES, math.ceil(math.sqrt(len(squares) / NUM_BLOCKS)))
    block_px = side * options.tile_px
    return [f"{sources[t.image].name}_block_{t.row // block_px:04d}_{t.col // block_px:04d}" for t in tiles]


def _coordinates(tiles: Sequence[Tile], options: PackOptions) -> NDArray[np.float64]:
    """Return row, column and a third coordinate (N, 3) that keeps images farther apart than any gap."""
    coordinates = np.array([(tile.row, tile.col, tile.image) for tile in tiles], np.float64)
    coordinates[:, 2] *= 2 * (options.tile_px + options.gap_px)
    return coordinates


def _in_gap(
    split_of_tile: NDArray[np.int64], coordinates: NDArray[np.float64], options: PackOptions
) -> NDArray[np.bool_]:
    """Return the tiles to drop (N,), so that tiles of different splits share no pixel and are `gap_px` apart.

    Of two tiles that are too near, the one whose split has the larger share is dropped.
    """
    reach_px = options.tile_px + options.gap_px - 0.5
    dropped = np.zeros(len(coordinates), bool)
    for split in sorted(range(len(SPLITS)), key=lambda split: -options.split[split]):
        others = coordinates[(split_of_tile != split) & ~dropped]
        members = np.flatnonzero(split_of_tile == split)
        if len(others) and len(members):
            distance_px, _ = cKDTree(others).query(coordinates[members], p=np.inf, distance_upper_bound=reach_px)
            dropped[members[np.isfinite(distance_px)]] = True
    return dropped
