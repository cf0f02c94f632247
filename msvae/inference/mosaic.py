"""A few rows of a raster in memory, to which windows are added until they are complete. C bands."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from msvae.inference.windows import WindowsAlong


class Mosaic:
    """Windows of some columns of a raster, blended. Rows are taken out from the top, when no window changes them."""

    def __init__(self, num_bands: int, down: WindowsAlong, across: WindowsAlong, cols: range) -> None:
        self._down, self._across, self._cols = down, across, cols
        self._blended_CHW = np.zeros((num_bands, 0, len(cols)), np.float32)
        self._first_row = 0

    def add(self, window_row: int, window_col: int, tile_CHW: NDArray[np.float32]) -> None:
        """Take in one window, which must not begin above the rows that were taken out."""
        row = self._down.starts[window_row] - self._first_row
        self._reach(row + tile_CHW.shape[1])
        left = self._across.starts[window_col] - self._cols.start
        # a window may reach beyond the columns on either side
        seen = slice(max(0, -left), min(tile_CHW.shape[2], len(self._cols) - left))
        weights_HW = np.outer(self._down.weights(window_row), self._across.weights(window_col)[seen])
        target = self._blended_CHW[:, row : row + tile_CHW.shape[1], left + seen.start : left + seen.stop]
        target += tile_CHW[..., seen] * weights_HW

    def take(self, end_row: int) -> tuple[int, NDArray[np.float32]]:
        """First row, and all rows from there to before `end_row`, (C, rows, columns). Those are then forgotten."""
        first, num_rows = self._first_row, end_row - self._first_row
        self._reach(num_rows)
        # copied, so that the memory of the whole is free again
        rows_CHW, self._blended_CHW = (part.copy() for part in np.split(self._blended_CHW, [num_rows], axis=1))
        self._first_row = end_row
        return first, rows_CHW

    def _reach(self, num_rows: int) -> None:
        bands, height, width = self._blended_CHW.shape
        if num_rows > height:
            added = np.zeros((bands, num_rows - height, width), np.float32)
            self._blended_CHW = np.concatenate([self._blended_CHW, added], axis=1)
