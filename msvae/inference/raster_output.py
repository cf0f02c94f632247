"""The file that a reconstruction becomes: like the image that it was made of, and there in full or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window

from msvae.bands import Bands
from msvae.files import remove_abandoned, replace_file
from msvae.rasters.planes import Georeference

BLOCK_PX = 256
"""Side of the blocks of a GeoTIFF. Each is written whole and once: a second time it would take new room."""


class RasterOutput(Protocol):
    """An image that is written block by block."""

    def write(self, row: int, col: int, values_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> None:
        """Put pixels in their place; those off the leaf already hold what stands there."""

    def close(self) -> None:
        """See that everything is on disk."""


class GeoTiff:
    """A tiled, compressed GeoTIFF; BigTIFF where it may grow beyond 4 GB."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        dtype: str,
        bands: Bands,
        scales: tuple[float, ...],
        offsets: tuple[float, ...],
        nodata: Any,
        georeference: Georeference,
        has_mask: bool,
    ) -> None:
        self._path, self._has_mask = path, has_mask
        self._raster = rasterio.open(
            path,
            "w",
            driver="GTiff",
            count=len(bands),
            height=shape[0],
            width=shape[1],
            dtype=dtype,
            nodata=nodata,
            tiled=True,
            blockxsize=BLOCK_PX,
            blockysize=BLOCK_PX,
            interleave="band",
            compress="deflate",
            predictor=3 if np.dtype(dtype).kind == "f" else 2,
            bigtiff="if_safer",
            photometric="minisblack",
            **georeference.profile,
        )
        self._raster.update_tags(**georeference.tags)
        self._raster.colorinterp = (ColorInterp.gray, *(ColorInterp.undefined,) * (len(bands) - 1))
        self._raster.scales, self._raster.offsets = scales, offsets
        for number, (name, nm) in enumerate(zip(bands.names, bands.wavelengths_nm, strict=True), start=1):
            self._raster.set_band_description(number, name)
            self._raster.update_tags(number, wavelength=f"{nm:g}", wavelength_units="nm")

    def write(self, row: int, col: int, values_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> None:
        """See `RasterOutput`; where nothing else can tell, a mask band says what is leaf."""
        height, width = leaf_HW.shape
        window = Window(col, row, width, height)
        self._raster.write(values_CHW, window=window)
        if self._has_mask:
            self._raster.write_mask(leaf_HW, window=window)

    def close(self) -> None:
        """See `RasterOutput`. GDAL does not always tell that the last blocks found no room: they are read again."""
        self._raster.close()
        with rasterio.open(self._path) as written:
            last = Window(written.width - 1, written.height - 1, 1, 1)
            written.read(window=last)


class Npy:
    """An array whose axes stand in the order of `axes`, such as `hwc`."""

    def __init__(self, path: Path, shape_CHW: tuple[int, int, int], dtype: str, axes: str) -> None:
        self._path, self._axes = path, axes
        lengths = dict(zip("chw", shape_CHW, strict=True))
        shape = tuple(lengths[axis] for axis in axes)
        np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)

    def write(self, row: int, col: int, values_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> None:
        """See `RasterOutput`."""
        height, width = leaf_HW.shape
        # mapped anew each time: pages of a map that stays count as memory of the process
        array = np.lib.format.open_memmap(self._path, "r+")
        array_CHW = array.transpose([self._axes.index(axis) for axis in "chw"])
        array_CHW[:, row : row + height, col : col + width] = values_CHW

    def close(self) -> None:
        """See `RasterOutput`."""


@contextmanager
def replace_raster(path: Path) -> Iterator[Path]:
    """Yield a hidden name to write to. It becomes `path` when the block ends and is removed when the block raises.

    Raises: ValueError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        with replace_file(path) as partial:
            yield partial
    except (OSError, RasterioError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"writing {path} failed: {reason}; free space there or choose another place") from error
