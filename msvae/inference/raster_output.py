"""Write a reconstruction to a file with the type, scale and nodata of its image. The file is complete or absent."""

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
from msvae.rasters.pixel_format import PixelFormat
from msvae.rasters.planes import Georeference

BLOCK_PX = 256
"""Side of the blocks of a GeoTIFF. Each block is written once and complete: GDAL appends a block that is rewritten."""
EXACT_INTEGERS = 2**53
"""Largest number up to which float64 represents every integer."""


def fill_value(dtype: str, nodata: Any) -> Any:
    """Return the value of background pixels: nodata, else NaN for floats and 0 for integers."""
    if nodata is not None:
        return nodata
    return np.nan if np.dtype(dtype).kind == "f" else 0


def leaf_values(
    reflectance_CHW: NDArray[np.float32], leaf_HW: NDArray[np.bool_], pixel_format: PixelFormat, nodata: Any
) -> NDArray[Any]:
    """Return reflectance as values (C, H, W) in the type and scale of the image.

    Integers are rounded and clipped. Values on the leaf that would equal nodata become the next representable value.

    Raises: ValueError if reflectance on the leaf is not finite.
    """
    dtype = np.dtype(pixel_format.source_dtype)
    values_CHW: NDArray[Any]
    scale, offset = (
        np.array(per_band)[:, None, None] for per_band in (pixel_format.source_scale, pixel_format.source_offset)
    )
    exact_CHW = (reflectance_CHW.astype(np.float64) - offset) / scale
    if not np.isfinite(exact_CHW[:, leaf_HW]).all():
        raise ValueError("the model returns reflectance that is not finite; train it again, or use another checkpoint")
    if dtype.kind == "f":
        values_CHW = exact_CHW.astype(dtype)
        next_to_nodata = np.nextafter(dtype.type(nodata), dtype.type(0)) if nodata else np.finfo(dtype).tiny
    else:
        low, high = max(np.iinfo(dtype).min, -EXACT_INTEGERS), min(np.iinfo(dtype).max, EXACT_INTEGERS)
        exact_CHW[~np.isfinite(exact_CHW)] = 0
        values_CHW = np.rint(exact_CHW).clip(low, high).astype(dtype)
        next_to_nodata = nodata if nodata is None else nodata + 1 if nodata < high else nodata - 1
    if nodata is not None:
        values_CHW[values_CHW == nodata] = next_to_nodata
    values_CHW[:, ~leaf_HW] = fill_value(pixel_format.source_dtype, nodata)
    return values_CHW


class RasterOutput(Protocol):
    """An image file that is written block by block."""

    def write(self, row: int, col: int, values_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> None:
        """Write a block of pixels that starts at `row` and `col`. Background pixels have the value `fill_value`."""

    def close(self) -> None:
        """Write everything to the disk."""


class GeoTiff:
    """A tiled, compressed GeoTIFF. It is a BigTIFF if it may grow beyond 4 GB."""

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
        """Write pixels, and the leaf mask if the file has a mask band."""
        height, width = leaf_HW.shape
        window = Window(col, row, width, height)
        self._raster.write(values_CHW, window=window)
        if self._has_mask:
            self._raster.write_mask(leaf_HW, window=window)

    def close(self) -> None:
        """Close the file and read its last block, since GDAL does not always report that the disk was full."""
        self._raster.close()
        with rasterio.open(self._path) as written:
            last = Window(written.width - 1, written.height - 1, 1, 1)
            written.read(window=last)


class Npy:
    """A `.npy` array with axes in the order of `axes`, such as `hwc`."""

    def __init__(self, path: Path, shape_CHW: tuple[int, int, int], dtype: str, axes: str) -> None:
        self._path, self._axes = path, axes
        lengths = dict(zip("chw", shape_CHW, strict=True))
        shape = tuple(lengths[axis] for axis in axes)
        np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)

    def write(self, row: int, col: int, values_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> None:
        """Write pixels. The leaf mask is not stored."""
        height, width = leaf_HW.shape
        # a new mapping each time, because pages of an open mapping count as memory of the process
        array = np.lib.format.open_memmap(self._path, "r+")
        array_CHW = array.transpose([self._axes.index(axis) for axis in "chw"])
        array_CHW[:, row : row + height, col : col + width] = values_CHW

    def close(self) -> None:
        """Do nothing: every write is complete."""


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
        raise ValueError(f"writing {path} failed: {reason}; free space there or choose another path") from error
