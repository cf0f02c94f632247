"""Where tiles may lie in an image, and how many leaf pixels each place holds.

Legend: R and C rows and columns of places or cells, H and W pixels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msvae.packing.options import PackOptions

NO_LEAF = "no leaf pixel"
OUT_OF_REACH = "leaf pixels that no whole tile of the grid reaches; --tiling leaf does, or another --tile or --stride"
CELL_SIDES_PX = (8, 16, 32, 64)
MAX_CELLS = 2**22
"""Of a leaf map in memory: larger images get larger cells."""


@dataclass(frozen=True)
class Tile:
    """A square of one image: `row` and `col` of its first pixel, and how many of its pixels are leaf."""

    image: int
    row: int
    col: int
    leaf_pixels: int


@dataclass(frozen=True)
class Places:
    """First rows (R) and first columns (C) at which a tile may lie, and the cells between all their borders."""

    tile_px: int
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    height: int
    width: int

    @property
    def row_edges(self) -> NDArray[np.int64]:
        """Borders of cells, from 0 to the height: every tile begins and ends on one."""
        return np.unique(np.concatenate([[0, self.height], self.rows, self.rows + self.tile_px]))

    @property
    def col_edges(self) -> NDArray[np.int64]:
        """Borders of cells, from 0 to the width."""
        return np.unique(np.concatenate([[0, self.width], self.cols, self.cols + self.tile_px]))

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)


def places(height: int, width: int, options: PackOptions) -> Places:
    """All places in an image: the grid, or for leaf tiling one every cell and one at the far borders."""
    tile_px = options.tile_px
    if options.tiling == "grid":
        step, to_border = options.stride_px or tile_px, False
    else:
        step, to_border = leaf_cell_px(height, width, tile_px), True
    starts = []
    for length in (height, width):
        along = np.arange(0, length - tile_px + 1, step, dtype=np.int64)
        if to_border and length >= tile_px:
            along = np.union1d(along, [length - tile_px])
        starts.append(along)
    return Places(tile_px, starts[0], starts[1], height, width)


def leaf_cell_px(height: int, width: int, tile_px: int) -> int:
    """Side of the cells in which leaf is counted to place tiles: as fine as memory allows."""
    sides = [side for side in CELL_SIDES_PX if tile_px % side == 0]
    return next((side for side in sides if height * width <= MAX_CELLS * side**2), sides[-1])


def summed_area(cells_RC: NDArray[np.integer]) -> NDArray[np.int64]:
    """Sums of all cells above and left of each corner, (R + 1, C + 1)."""
    table = np.zeros((cells_RC.shape[0] + 1, cells_RC.shape[1] + 1), np.int64)
    np.cumsum(np.cumsum(cells_RC, axis=0, dtype=np.int64), axis=1, out=table[1:, 1:])
    return table


def leaf_pixels_of_places(where: Places, cells_RC: NDArray[np.integer]) -> NDArray[np.int64]:
    """Leaf pixels of a tile at every place (R, C), from those of the cells."""
    table = summed_area(cells_RC)
    top, bottom = (np.searchsorted(where.row_edges, where.rows + shift) for shift in (0, where.tile_px))
    left, right = (np.searchsorted(where.col_edges, where.cols + shift) for shift in (0, where.tile_px))
    below, above = table[bottom], table[top]
    return below[:, right] - below[:, left] - above[:, right] + above[:, left]


def grid_tiles(
    image: int, where: Places, cells_RC: NDArray[np.integer], min_coverage: float
) -> tuple[list[Tile], Counter[str]]:
    """Tiles of the grid that hold enough leaf, row by row, and why others were dropped."""
    leaf_pixels_RC = leaf_pixels_of_places(where, cells_RC)
    enough_RC = leaf_pixels_RC / where.tile_px**2 >= min_coverage
    keep_RC = enough_RC & (leaf_pixels_RC > 0)
    tiles = [
        Tile(image, int(where.rows[r]), int(where.cols[c]), int(leaf_pixels_RC[r, c])) for r, c in np.argwhere(keep_RC)
    ]
    dropped = Counter(
        {
            too_little_leaf(min_coverage): int((~enough_RC).sum()),
            NO_LEAF: int((enough_RC & ~keep_RC).sum()),
            OUT_OF_REACH: _out_of_reach(where, cells_RC),
        }
    )
    return tiles, +dropped


def _out_of_reach(where: Places, cells_RC: NDArray[np.integer]) -> int:
    """Leaf pixels behind the last place, or between places that do not touch."""

    def reached(edges: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        begins = edges[:-1]
        return begins < starts[np.searchsorted(starts, begins, "right") - 1] + where.tile_px

    inside_RC = cells_RC[reached(where.row_edges, where.rows)][:, reached(where.col_edges, where.cols)]
    return int(cells_RC.sum()) - int(inside_RC.sum())


def too_little_leaf(min_coverage: float) -> str:
    """The reason for which most tiles are dropped."""
    return f"coverage below {min_coverage:.2f}"


def covered_pixels(where: Places, cells_RC: NDArray[np.integer], tiles: list[Tile]) -> int:
    """Leaf pixels that lie in at least one of the tiles."""
    if not tiles:
        return 0
    row_edges, col_edges = where.row_edges, where.col_edges
    covered_RC = np.zeros(cells_RC.shape, bool)
    for tile in tiles:
        top, bottom = np.searchsorted(row_edges, (tile.row, tile.row + where.tile_px))
        left, right = np.searchsorted(col_edges, (tile.col, tile.col + where.tile_px))
        covered_RC[top:bottom, left:right] = True
    return int(cells_RC[covered_RC].sum())
