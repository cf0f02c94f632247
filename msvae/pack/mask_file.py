"""A leaf mask in a file of its own."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window

from msvae.pack.raster import RasterInfo
from msvae.pack.sources import ImageSource

FLOAT_MASK_THRESHOLD = 0.5
MAX_SLAB_BYTES = 64 * 2**20


class MaskFile:
    """An open mask: leaf where any plane but transparency is set. Use as a context manager.

    Raises: ValueError when the file cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        self._rows: tuple[int, int, NDArray[np.bool_]] | None = None
        try:
            self._mask = rasterio.open(file)
        except RasterioError as error:
            raise ValueError(f"mask {file} cannot be opened ({error}); make it again") from error
        # masks are also painted in colour
        meanings = zip(self._mask.indexes, self._mask.colorinterp, strict=True)
        self._planes = [index for index, meaning in meanings if meaning != ColorInterp.alpha]

    def __enter__(self) -> MaskFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._mask.close()

    def check_size(self, source: ImageSource, info: RasterInfo) -> None:
        """Raises: ValueError when mask and image differ in size."""
        if self._mask.shape != (info.height, info.width):
            raise ValueError(
                f"mask {self._mask.name} has {self._mask.height} x {self._mask.width} px but {source.path} has "
                f"{info.height} x {info.width} px; make the mask at the size of the image"
            )

    def read(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        """Leaf in a window (H, W). Whole rows are kept: a PNG can only be decoded from its top.

        Raises: ValueError when the file is damaged.
        """
        if height * self._mask.width * len(self._planes) > MAX_SLAB_BYTES:
            return self._decode(row, col, height, width)
        if self._rows is None or self._rows[:2] != (row, height):
            self._rows = (row, height, self._decode(row, 0, height, self._mask.width))
        return self._rows[2][:, col : col + width]

    def _decode(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        try:
            values = self._mask.read(self._planes, window=Window(col, row, width, height))
        except RasterioError as error:
            raise ValueError(
                f"mask {self._mask.name} cannot be read at row {row} ({error.__cause__ or error}); "
                "it is truncated or damaged, make it again"
            ) from error
        leaf = values > (FLOAT_MASK_THRESHOLD if values.dtype.kind == "f" else 0)
        any_plane_HW: NDArray[np.bool_] = leaf.any(axis=0)
        return any_plane_HW
