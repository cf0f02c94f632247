"""The grid of tiles over an image, and the survey that finds which of them hold leaf."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from msvae.pack.masks import MaskedImage

TOO_SMALL = "image smaller than a tile"
NO_LEAF = "no leaf pixel"


@dataclass(frozen=True)
class Tile:
    """A square of one image: `row` and `col` of its first pixel, and how many of its pixels are leaf."""

    image: int
    row: int
    col: int
    leaf_pixels: int


def num_grid_tiles(height: int, width: int, tile_px: int) -> int:
    """Full tiles in an image."""
    return (height // tile_px) * (width // tile_px)


def grid(height: int, width: int, tile_px: int) -> Iterator[tuple[int, int]]:
    """First row and column of every full tile, row by row, without overlap."""
    for row in range(0, height - tile_px + 1, tile_px):
        for col in range(0, width - tile_px + 1, tile_px):
            yield row, col


@dataclass
class Survey:
    """Tiles worth keeping, in the order of the images, and why others were dropped."""

    tile_px: int
    min_coverage: float

    def __post_init__(self) -> None:
        self.tiles: list[Tile] = []
        self.dropped: Counter[str] = Counter()

    def add_image(self, index: int, image: MaskedImage, on_tile: Callable[[], None]) -> bool:
        """Look at every tile of one image, window by window. Returns whether any background was seen."""
        info = image.raster.info
        background_seen = False
        for row, col in grid(info.height, info.width, self.tile_px):
            _, leaf_HW = image.read(row, col, self.tile_px)
            background_seen = background_seen or not leaf_HW.all()
            self._judge(Tile(index, row, col, int(np.count_nonzero(leaf_HW))))
            on_tile()
        return background_seen

    def drop_small_image(self) -> None:
        """Count an image in which not one tile fits."""
        self.dropped[TOO_SMALL] += 1

    def _judge(self, tile: Tile) -> None:
        if tile.leaf_pixels / self.tile_px**2 < self.min_coverage:
            self.dropped[f"coverage below {self.min_coverage:.2f}"] += 1
        elif tile.leaf_pixels == 0:
            self.dropped[NO_LEAF] += 1
        else:
            self.tiles.append(tile)
