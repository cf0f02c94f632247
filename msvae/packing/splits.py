"""Which tiles train, validate and test: plants, images or blocks stay whole, with a gap between splits."""

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

from msvae.packing.options import SPLITS, PackOptions
from msvae.packing.tiling import Tile
from msvae.rasters.sources import ImageSource
from msvae.shards.order import permutation

MIN_IMAGES_TO_SPLIT_BY = 3
NUM_BLOCKS = 16
"""About as many blocks as are dealt by default: fewer lose fewer tiles to the gap, more mix the splits better."""
MIN_BLOCK_TILES = 2
NUM_DEALINGS = 64
"""Ways to deal blocks that are tried, to lose few tiles to the gap."""
MAX_TILES_DEALT = 200_000
"""In all dealings after the first: they must not take longer than packing."""
TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class SplitTiles:
    """Tiles of each split in their first order, and the name of what each of them stays together with."""

    tiles: dict[str, list[Tile]]
    group_of: dict[Tile, str]
    split_by: str
    num_in_gap: int
    """Tiles left out because they stand too near to another split."""


def group_names(sources: Sequence[ImageSource], group_by: str) -> list[str]:
    """The group of each image: the first group of the pattern in its path, else all that matches.

    The part of the path that differs between images is searched first: a folder that holds all of them groups none.

    Raises: ValueError for an image that does not match.
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


def resolve_split_by(options: PackOptions, tiles: Sequence[Tile]) -> str:
    """`group`, `image` or `block`; `auto` asks for three images with leaf before it splits by image."""
    if options.group_by is not None:
        return "group"
    if options.split_by != "auto":
        return options.split_by
    return "image" if len({tile.image for tile in tiles}) >= MIN_IMAGES_TO_SPLIT_BY else "block"


def split_tiles(tiles: Sequence[Tile], sources: Sequence[ImageSource], options: PackOptions) -> SplitTiles:
    """Deal the tiles, group by group. Tiles of different splits in one image lie `gap_px` apart."""
    split_by = resolve_split_by(options, tiles)
    groups = _groups(tiles, sources, split_by, options)
    names, group_of_tile = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_of_tile, minlength=len(names)).tolist()
    places = _places(tiles, options)
    best: tuple[int, NDArray[np.int64], NDArray[np.bool_]] | None = None
    num_dealings = min(NUM_DEALINGS, 1 + MAX_TILES_DEALT // len(tiles)) if split_by == "block" else 1
    for dealing in range(num_dealings):
        key = (options.seed, dealing) if dealing else (options.seed,)
        split_of_tile = np.array(deal(sizes, options.split, *key))[group_of_tile]
        dropped = np.zeros(len(tiles), bool)
        if split_by == "block":
            dropped = _in_gap(split_of_tile, places, options)
        kept = int(np.count_nonzero(~dropped))
        if best is None or kept > best[0]:
            best = kept, split_of_tile, dropped
    assert best is not None
    _, split_of_tile, dropped = best
    if not np.any((split_of_tile == TRAIN) & ~dropped):
        raise ValueError(
            f"no training tile is left: all lie nearer than {options.gap_px} px to another split; lower --gap-px, or "
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


def _groups(tiles: Sequence[Tile], sources: Sequence[ImageSource], split_by: str, options: PackOptions) -> list[str]:
    """The name of the group of each tile."""
    if split_by == "group":
        assert options.group_by is not None
        names = group_names(sources, options.group_by)
        return [names[tile.image] for tile in tiles]
    if split_by == "image":
        return [sources[tile.image].name for tile in tiles]
    apart = {(tile.image, tile.row // options.tile_px, tile.col // options.tile_px) for tile in tiles}
    side = options.block_tiles or max(MIN_BLOCK_TILES, math.ceil(math.sqrt(len(apart) / NUM_BLOCKS)))
    block_px = side * options.tile_px
    return [f"{sources[t.image].name}_block_{t.row // block_px:04d}_{t.col // block_px:04d}" for t in tiles]


def _places(tiles: Sequence[Tile], options: PackOptions) -> NDArray[np.float64]:
    """Row, column, and a third coordinate (N, 3) that keeps images out of reach of each other."""
    places = np.array([(tile.row, tile.col, tile.image) for tile in tiles], np.float64)
    places[:, 2] *= 2 * (options.tile_px + options.gap_px)
    return places


def _in_gap(split_of_tile: NDArray[np.int64], places: NDArray[np.float64], options: PackOptions) -> NDArray[np.bool_]:
    """Tiles that share pixels with a tile of another split or have fewer than `gap_px` between them.

    Of two such tiles the one whose split has the larger share goes.
    """
    reach_px = options.tile_px + options.gap_px - 0.5
    dropped = np.zeros(len(places), bool)
    for split in sorted(range(len(SPLITS)), key=lambda split: -options.split[split]):
        others = places[(split_of_tile != split) & ~dropped]
        members = np.flatnonzero(split_of_tile == split)
        if len(others) and len(members):
            distance_px, _ = cKDTree(others).query(places[members], p=np.inf, distance_upper_bound=reach_px)
            dropped[members[np.isfinite(distance_px)]] = True
    return dropped


def deal(sizes: Sequence[int], shares: Sequence[float], *key: int) -> list[int]:
    """The split of each group: shuffled, then largest first to where most is missing.

    Every split with a share gets at least one group where there are enough groups, training before the others.
    """
    shuffled = [int(i) for i in permutation(len(sizes), *key)]
    order = sorted(shuffled, key=lambda i: -sizes[i])
    open_splits = [split for split, share in enumerate(shares) if share > 0]
    missing = [share * sum(sizes) for share in shares]
    dealt = [0] * len(sizes)
    groups: dict[int, list[int]] = {split: [] for split in open_splits}
    for index in order:
        split = max(open_splits, key=lambda s: missing[s])
        missing[split] -= sizes[index]
        groups[split].append(index)
    for empty in (split for split in open_splits if not groups[split]):
        giver = max(open_splits, key=lambda s: (len(groups[s]) > 1, -missing[s]))
        if len(groups[giver]) < 2 and empty != TRAIN:
            continue
        smallest = groups[giver].pop()
        missing[giver] += sizes[smallest]
        groups[empty].append(smallest)
    for split, members in groups.items():
        for index in members:
            dealt[index] = split
    return dealt
