"""Tiles of an image, chosen from the numbers of leaf pixels in its cells.

`grid_tiles` cuts a regular grid. `leaf_tiles` covers the leaves with few tiles, by greedy set cover and local
refinement. Legend: R and C are rows and columns of tile positions or of cells.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msvae.packing.options import PackOptions

NO_LEAF = "no leaf pixel"
OUT_OF_REACH = "leaf pixels that no whole tile of the grid reaches; use --tiling leaf, or another --tile or --stride"
CELL_SIDES_PX = (8, 16, 32, 64)
MAX_CELLS = 2**22
"""Largest number of cells of an image in memory. Larger images get larger cells."""
TARGET_SHARE = 0.99
"""Share to cover of those leaf pixels that tiles with enough leaf can hold."""
MAX_ROUNDS = 8
"""Largest number of rounds of refinement. Later rounds hardly improve the result."""
Position = tuple[int, int]
"""Indices into the rows and columns of `TilePositions`."""


@dataclass(frozen=True)
class Tile:
    """A square of one image: row and column of its first pixel, and its number of leaf pixels."""

    image: int
    row: int
    col: int
    leaf_pixels: int


@dataclass(frozen=True)
class TilePositions:
    """All positions that a tile may have in an image: first rows (R) and first columns (C), in pixels.

    Cells are the rectangles between the borders of all these tiles.
    """

    tile_px: int
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    height: int
    width: int

    @property
    def row_edges(self) -> NDArray[np.int64]:
        """Borders of cells, from 0 to the height. Every tile begins and ends on one."""
        return np.unique(np.concatenate([[0, self.height], self.rows, self.rows + self.tile_px]))

    @property
    def col_edges(self) -> NDArray[np.int64]:
        """Borders of cells, from 0 to the width."""
        return np.unique(np.concatenate([[0, self.width], self.cols, self.cols + self.tile_px]))

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)


def tile_positions(height: int, width: int, options: PackOptions) -> TilePositions:
    """Return the positions of the grid, or for leaf tiling one position per cell and one at the far borders."""
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
    return TilePositions(tile_px, starts[0], starts[1], height, width)


def leaf_cell_px(height: int, width: int, tile_px: int) -> int:
    """Return the side of the cells of leaf tiling: the smallest for which an image has at most MAX_CELLS."""
    sides = [side for side in CELL_SIDES_PX if tile_px % side == 0]
    return next((side for side in sides if height * width <= MAX_CELLS * side**2), sides[-1])


def grid_tiles(
    image: int, positions: TilePositions, cells_RC: NDArray[np.integer], min_coverage: float
) -> tuple[list[Tile], Counter[str]]:
    """Return the tiles of the grid that hold enough leaf, row by row, and the number of dropped tiles by reason."""
    leaf_pixels_RC = _leaf_pixels_at(positions, cells_RC)
    enough_RC = leaf_pixels_RC / positions.tile_px**2 >= min_coverage
    keep_RC = enough_RC & (leaf_pixels_RC > 0)
    tiles = [
        Tile(image, int(positions.rows[r]), int(positions.cols[c]), int(leaf_pixels_RC[r, c]))
        for r, c in np.argwhere(keep_RC)
    ]
    dropped = Counter(
        {
            f"coverage below {min_coverage:.2f}": int((~enough_RC).sum()),
            NO_LEAF: int((enough_RC & ~keep_RC).sum()),
            OUT_OF_REACH: _leaf_pixels_out_of_reach(positions, cells_RC),
        }
    )
    return tiles, +dropped


def count_covered_pixels(positions: TilePositions, cells_RC: NDArray[np.integer], tiles: list[Tile]) -> int:
    """Count the leaf pixels in at least one of the tiles."""
    if not tiles:
        return 0
    row_edges, col_edges = positions.row_edges, positions.col_edges
    covered_RC = np.zeros(cells_RC.shape, bool)
    for tile in tiles:
        top, bottom = np.searchsorted(row_edges, (tile.row, tile.row + positions.tile_px))
        left, right = np.searchsorted(col_edges, (tile.col, tile.col + positions.tile_px))
        covered_RC[top:bottom, left:right] = True
    return int(cells_RC[covered_RC].sum())


class LeafCover:
    """The chosen tiles over the cells of one image. Tiles can be added and removed."""

    def __init__(self, positions: TilePositions, cells_RC: NDArray[np.integer], min_coverage: float) -> None:
        tile_px = positions.tile_px
        self.leaf_RC = _leaf_pixels_at(positions, cells_RC)
        self._allowed_RC = (self.leaf_RC > 0) & (self.leaf_RC / tile_px**2 >= min_coverage)
        self._top, self._bottom = (np.searchsorted(positions.row_edges, positions.rows + px) for px in (0, tile_px))
        self._left, self._right = (np.searchsorted(positions.col_edges, positions.cols + px) for px in (0, tile_px))
        self._positions = positions
        self._num_tiles_RC = np.zeros(cells_RC.shape, np.uint16)
        self._cells_RC = cells_RC
        self.holdable_pixels = int(cells_RC[self._reachable(cells_RC.shape)].sum())
        self.covered_pixels = 0
        self.chosen: set[Position] = set()

    def _reachable(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Return the cells of all allowed tiles: +1 and -1 at the corners of each tile, then summed up."""
        corners_RC = np.zeros((shape[0] + 1, shape[1] + 1), np.int32)
        rows, cols = np.nonzero(self._allowed_RC)
        for row, row_sign in ((self._top, 1), (self._bottom, -1)):
            for col, col_sign in ((self._left, 1), (self._right, -1)):
                np.add.at(corners_RC, (row[rows], col[cols]), row_sign * col_sign)
        reachable_RC: NDArray[np.bool_] = np.cumsum(np.cumsum(corners_RC, axis=0), axis=1)[:-1, :-1] > 0
        return reachable_RC

    def blocks(self) -> Iterator[tuple[Position, Position]]:
        """Iterate over all positions in blocks about as wide as a tile: first position, and the one after the last."""
        num_rows, num_cols = self.leaf_RC.shape
        side = max(1, int(self._bottom[0]))
        for row in range(0, num_rows, side):
            for col in range(0, num_cols, side):
                yield (row, col), (min(row + side, num_rows), min(col + side, num_cols))

    def allowed(self) -> list[Position]:
        """Return the positions whose tiles hold enough leaf."""
        return [(int(r), int(c)) for r, c in np.argwhere(self._allowed_RC)]

    def cells_of(self, position: Position) -> tuple[slice, slice]:
        """Return the cells of a tile."""
        r, c = position
        return slice(self._top[r], self._bottom[r]), slice(self._left[c], self._right[c])

    def add(self, position: Position) -> None:
        """Add the tile at a position."""
        cells = self.cells_of(position)
        self.covered_pixels += int(self._cells_RC[cells][self._num_tiles_RC[cells] == 0].sum())
        self._num_tiles_RC[cells] += 1
        self.chosen.add(position)

    def remove(self, position: Position) -> None:
        """Remove the tile at a position."""
        cells = self.cells_of(position)
        self._num_tiles_RC[cells] -= 1
        self.covered_pixels -= int(self._cells_RC[cells][self._num_tiles_RC[cells] == 0].sum())
        self.chosen.discard(position)

    def own_pixels(self, position: Position) -> int:
        """Count the leaf pixels that only this tile covers."""
        cells = self.cells_of(position)
        return int(self._cells_RC[cells][self._num_tiles_RC[cells] == 1].sum())

    def gains(self, first: Position, last: Position) -> NDArray[np.int64]:
        """Return the uncovered leaf pixels of the tile at each allowed position from `first` to before `last`."""
        rows, cols = slice(first[0], last[0]), slice(first[1], last[1])
        top, bottom, left, right = self._top[rows], self._bottom[rows], self._left[cols], self._right[cols]
        cells = np.s_[top[0] : bottom[-1], left[0] : right[-1]]
        table = _summed_area(np.where(self._num_tiles_RC[cells] == 0, self._cells_RC[cells], 0))
        below, above = table[bottom - top[0]], table[top - top[0]]
        left, right = left - left[0], right - left[0]
        gains_RC = below[:, right] - below[:, left] - above[:, right] + above[:, left]
        return np.where(self._allowed_RC[rows, cols], gains_RC, 0)

    def best(self, first: Position, last: Position) -> tuple[int, Position]:
        """Return the largest gain in a range of positions and its position; the first one of equal gains."""
        gains_RC = self.gains(first, last)
        r, c = divmod(int(gains_RC.argmax()), gains_RC.shape[1])
        return int(gains_RC[r, c]), (first[0] + r, first[1] + c)

    def neighbours(self, position: Position) -> tuple[Position, Position]:
        """Return the range of positions whose tiles share pixels with the tile at `position`, as for `gains`."""
        (r, c), px, rows, cols = position, self._positions.tile_px, self._positions.rows, self._positions.cols
        first = int(np.searchsorted(rows, rows[r] - px, "right")), int(np.searchsorted(cols, cols[c] - px, "right"))
        last = int(np.searchsorted(rows, rows[r] + px)), int(np.searchsorted(cols, cols[c] + px))
        return first, last


def leaf_tiles(image: int, positions: TilePositions, cells_RC: NDArray[np.integer], min_coverage: float) -> list[Tile]:
    """Return few tiles, none below `min_coverage`, that cover 99 % of the leaf pixels that such tiles can hold."""
    cover = LeafCover(positions, cells_RC, min_coverage)
    target = TARGET_SHARE * cover.holdable_pixels
    _cover_greedily(cover, target)
    _refine(cover, target)
    tiles = [
        Tile(image, int(positions.rows[r]), int(positions.cols[c]), int(cover.leaf_RC[r, c])) for r, c in cover.chosen
    ]
    return sorted(tiles, key=lambda tile: (tile.row, tile.col))


def _cover_greedily(cover: LeafCover, target: float) -> None:
    """Add the tile with the largest gain until the target is reached.

    Gains only shrink, so an earlier best gain of a block is an upper bound, and few blocks are evaluated again.
    """
    blocks = [(-math.inf, *corner) for corner in cover.blocks()]
    while blocks and cover.covered_pixels < target:
        _, first, last = heapq.heappop(blocks)
        gain, position = cover.best(first, last)
        if gain and (not blocks or gain >= -blocks[0][0]):
            cover.add(position)
        if gain:
            heapq.heappush(blocks, (-gain, first, last))


def _refine(cover: LeafCover, target: float) -> None:
    """Move tiles to neighbouring positions with a larger gain and remove unneeded tiles, while their number falls."""

    def by_own_pixels() -> list[Position]:
        return sorted(cover.chosen, key=lambda position: (cover.own_pixels(position), position))

    for _ in range(MAX_ROUNDS):
        num_before = len(cover.chosen)
        for position in by_own_pixels():
            cover.remove(position)
            gain, better = cover.best(*cover.neighbours(position))
            cover.add(better if gain > 0 else position)
        for position in by_own_pixels():
            if cover.covered_pixels - cover.own_pixels(position) >= target:
                cover.remove(position)
        if len(cover.chosen) == num_before:
            return


def _leaf_pixels_out_of_reach(positions: TilePositions, cells_RC: NDArray[np.integer]) -> int:
    """Count leaf pixels beyond the last position, or between positions whose tiles do not touch."""

    def reached(edges: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        begins = edges[:-1]
        return begins < starts[np.searchsorted(starts, begins, "right") - 1] + positions.tile_px

    inside_RC = cells_RC[reached(positions.row_edges, positions.rows)][:, reached(positions.col_edges, positions.cols)]
    return int(cells_RC.sum()) - int(inside_RC.sum())


def _leaf_pixels_at(positions: TilePositions, cells_RC: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the leaf pixels of a tile at every position (R, C), from those of the cells."""
    table = _summed_area(cells_RC)
    top, bottom = (np.searchsorted(positions.row_edges, positions.rows + px) for px in (0, positions.tile_px))
    left, right = (np.searchsorted(positions.col_edges, positions.cols + px) for px in (0, positions.tile_px))
    below, above = table[bottom], table[top]
    return below[:, right] - below[:, left] - above[:, right] + above[:, left]


def _summed_area(cells_RC: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the sum of all cells above and left of each corner, (R + 1, C + 1)."""
    table = np.zeros((cells_RC.shape[0] + 1, cells_RC.shape[1] + 1), np.int64)
    np.cumsum(np.cumsum(cells_RC, axis=0, dtype=np.int64), axis=1, out=table[1:, 1:])
    return table
