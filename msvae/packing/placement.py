"""Leaf tiling: few tiles that cover the leaves of an image, by greedy set cover and local refinement.

Legend: R and C rows and columns of places or cells.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from msvae.packing.tiling import Places, Tile, leaf_pixels_of_places, summed_area

TARGET_SHARE = 0.99
"""Of the leaf pixels that tiles of enough coverage can hold."""
MAX_ROUNDS = 8
"""Of refinement; later ones find next to nothing."""
Place = tuple[int, int]


class LeafCover:
    """A growing and shrinking set of tiles over the leaf map of one image."""

    def __init__(self, where: Places, cells_RC: NDArray[np.integer], min_coverage: float) -> None:
        self.leaf_RC = leaf_pixels_of_places(where, cells_RC)
        self._allowed_RC = (self.leaf_RC > 0) & (self.leaf_RC / where.tile_px**2 >= min_coverage)
        self._top, self._bottom = (np.searchsorted(where.row_edges, where.rows + px) for px in (0, where.tile_px))
        self._left, self._right = (np.searchsorted(where.col_edges, where.cols + px) for px in (0, where.tile_px))
        self._where = where
        self._times_RC = np.zeros(cells_RC.shape, np.uint16)
        self._cells_RC = cells_RC
        self.holdable_pixels = int(cells_RC[self._reachable(cells_RC.shape)].sum())
        self.covered_pixels = 0
        self.chosen: set[Place] = set()

    def _reachable(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Cells that lie in at least one allowed place: +1 and -1 at the corners of each, then summed up."""
        corners_RC = np.zeros((shape[0] + 1, shape[1] + 1), np.int32)
        rows, cols = np.nonzero(self._allowed_RC)
        for row, row_sign in ((self._top, 1), (self._bottom, -1)):
            for col, col_sign in ((self._left, 1), (self._right, -1)):
                np.add.at(corners_RC, (row[rows], col[cols]), row_sign * col_sign)
        reachable_RC: NDArray[np.bool_] = np.cumsum(np.cumsum(corners_RC, axis=0), axis=1)[:-1, :-1] > 0
        return reachable_RC

    def blocks(self) -> Iterator[tuple[Place, Place]]:
        """All places in blocks about as wide as a tile."""
        num_rows, num_cols = self.leaf_RC.shape
        side = max(1, int(self._bottom[0]))
        for row in range(0, num_rows, side):
            for col in range(0, num_cols, side):
                yield (row, col), (min(row + side, num_rows), min(col + side, num_cols))

    def allowed(self) -> list[Place]:
        """Places whose tiles hold enough leaf."""
        return [(int(r), int(c)) for r, c in np.argwhere(self._allowed_RC)]

    def cells_of(self, place: Place) -> tuple[slice, slice]:
        """The cells of a tile."""
        r, c = place
        return slice(self._top[r], self._bottom[r]), slice(self._left[c], self._right[c])

    def add(self, place: Place) -> None:
        """Put a tile there."""
        cells = self.cells_of(place)
        self.covered_pixels += int(self._cells_RC[cells][self._times_RC[cells] == 0].sum())
        self._times_RC[cells] += 1
        self.chosen.add(place)

    def remove(self, place: Place) -> None:
        """Take a tile away."""
        cells = self.cells_of(place)
        self._times_RC[cells] -= 1
        self.covered_pixels -= int(self._cells_RC[cells][self._times_RC[cells] == 0].sum())
        self.chosen.discard(place)

    def own_pixels(self, place: Place) -> int:
        """Leaf pixels that no other tile covers."""
        cells = self.cells_of(place)
        return int(self._cells_RC[cells][self._times_RC[cells] == 1].sum())

    def gains(self, first: Place, last: Place) -> NDArray[np.int64]:
        """Uncovered leaf pixels of the tile at each allowed place from `first` up to before `last`."""
        rows, cols = slice(first[0], last[0]), slice(first[1], last[1])
        top, bottom, left, right = self._top[rows], self._bottom[rows], self._left[cols], self._right[cols]
        cells = np.s_[top[0] : bottom[-1], left[0] : right[-1]]
        table = summed_area(np.where(self._times_RC[cells] == 0, self._cells_RC[cells], 0))
        below, above = table[bottom - top[0]], table[top - top[0]]
        left, right = left - left[0], right - left[0]
        gains_RC = below[:, right] - below[:, left] - above[:, right] + above[:, left]
        return np.where(self._allowed_RC[rows, cols], gains_RC, 0)

    def best(self, first: Place, last: Place) -> tuple[int, Place]:
        """The largest gain in a range of places; of equals the first by row and column."""
        gains_RC = self.gains(first, last)
        r, c = divmod(int(gains_RC.argmax()), gains_RC.shape[1])
        return int(gains_RC[r, c]), (first[0] + r, first[1] + c)

    def reach(self, place: Place) -> tuple[Place, Place]:
        """The range of places whose tiles share pixels with the tile at one, as far as `gains` wants it."""
        (r, c), px, where = place, self._where.tile_px, self._where
        first = (
            int(np.searchsorted(where.rows, where.rows[r] - px, "right")),
            int(np.searchsorted(where.cols, where.cols[c] - px, "right")),
        )
        last = (
            int(np.searchsorted(where.rows, where.rows[r] + px)),
            int(np.searchsorted(where.cols, where.cols[c] + px)),
        )
        return first, last


def leaf_tiles(image: int, where: Places, cells_RC: NDArray[np.integer], min_coverage: float) -> list[Tile]:
    """Few tiles, none below `min_coverage`, that cover 99 % of the leaf pixels which such tiles can hold."""
    cover = LeafCover(where, cells_RC, min_coverage)
    target = TARGET_SHARE * cover.holdable_pixels
    _cover_greedily(cover, target)
    _refine(cover, target)
    tiles = [Tile(image, int(where.rows[r]), int(where.cols[c]), int(cover.leaf_RC[r, c])) for r, c in cover.chosen]
    return sorted(tiles, key=lambda tile: (tile.row, tile.col))


def _cover_greedily(cover: LeafCover, target: float) -> None:
    """Add the tile that gains most, again and again.

    Gains only shrink, so the best of a block of places stays an upper bound, and few blocks are looked at again.
    """
    blocks = [(-math.inf, *corner) for corner in cover.blocks()]
    while blocks and cover.covered_pixels < target:
        _, first, last = heapq.heappop(blocks)
        gain, place = cover.best(first, last)
        if gain and (not blocks or gain >= -blocks[0][0]):
            cover.add(place)
        if gain:
            heapq.heappush(blocks, (-gain, first, last))


def _refine(cover: LeafCover, target: float) -> None:
    """Shift tiles to where they gain most and drop those that the target does not need, while that helps."""

    def by_own_pixels() -> list[Place]:
        return sorted(cover.chosen, key=lambda place: (cover.own_pixels(place), place))

    for _ in range(MAX_ROUNDS):
        before = len(cover.chosen)
        for place in by_own_pixels():
            cover.remove(place)
            gain, better = cover.best(*cover.reach(place))
            cover.add(better if gain > 0 else place)
        for place in by_own_pixels():
            if cover.covered_pixels - cover.own_pixels(place) >= target:
                cover.remove(place)
        if len(cover.chosen) == before:
            return
