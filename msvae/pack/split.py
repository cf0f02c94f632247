"""Which tiles train, validate and test: whole images or blocks of neighbours stay on one side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from msvae.pack.options import SPLITS
from msvae.pack.tiling import Tile
from msvae.shards.order import permutation

MIN_IMAGES_TO_SPLIT_BY = 3
TRAIN = SPLITS.index("train")


def resolve_split_by(split_by: str, tiles: Sequence[Tile]) -> str:
    """`image` or `block`; `auto` asks for three images with leaf before it splits by image."""
    if split_by != "auto":
        return split_by
    return "image" if len({tile.image for tile in tiles}) >= MIN_IMAGES_TO_SPLIT_BY else "block"


def split_tiles(
    tiles: Sequence[Tile], split_by: str, shares: Sequence[float], block_px: int, seed: int
) -> dict[str, list[Tile]]:
    """Tiles of each split, in their first order. `split_by` is `image` or `block`, blocks are `block_px` wide."""
    groups: dict[Hashable, list[Tile]] = defaultdict(list)
    for tile in tiles:
        block = (tile.row // block_px, tile.col // block_px) if split_by == "block" else ()
        groups[(tile.image, *block)].append(tile)
    sizes = [len(group) for group in groups.values()]
    split_of_group = dict(zip(groups, deal(sizes, shares, seed), strict=True))
    split_of_tile = {tile: split_of_group[key] for key, group in groups.items() for tile in group}
    return {name: [tile for tile in tiles if split_of_tile[tile] == index] for index, name in enumerate(SPLITS)}


def deal(sizes: Sequence[int], shares: Sequence[float], seed: int) -> list[int]:
    """The split of each group: shuffled, then largest first to where most is missing.

    Every split with a share gets at least one group where there are enough groups, training before the others.
    """
    shuffled = [int(i) for i in permutation(len(sizes), seed)]
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
