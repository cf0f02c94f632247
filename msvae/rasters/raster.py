"""An image of any file type: metadata of its bands, and windows of pixels.

Shapes: C bands, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.messages import counted
from msvae.rasters.gdal import GdalPlanes
from msvae.rasters.options import ReadOptions
from msvae.rasters.planes import Georeference, NpyPlanes, Planes
from msvae.rasters.sources import ImageSource

STORED_DTYPES = {name: name for name in ("uint8", "uint16", "int16", "float32")}
STORED_DTYPES |= {"int8": "int16", "float16": "float32"}
WIDE_DTYPES = ("uint32", "int32", "uint64", "int64", "float64")
"""Types that no stored type can hold. Their reflectance is stored as float32."""
STORED_DTYPES |= dict.fromkeys(WIDE_DTYPES, "float32")
MAX_SLAB_BYTES = 64 * 2**20
MIN_TILE_PX = 8
"""Smallest side of a tile. An image that is narrower probably has its axes in another order."""


@dataclass(frozen=True)
class RasterInfo:
    """Metadata of an image. Tuples have one entry per band."""

    height: int
    width: int
    dtype: str
    """Type of the values in the file."""
    names: tuple[str, ...] | None
    wavelengths_nm: tuple[float, ...] | None
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    states_nodata: bool
    """True if the file states a nodata value, or has a mask band."""

    def describe_bands(self) -> str:
        """Return text for messages, such as `4 bands (475, 560, 668, 840 nm)`."""
        num_bands = len(self.scales)
        if self.wavelengths_nm:
            inside = ", ".join(f"{nm:.0f}" for nm in self.wavelengths_nm) + " nm"
        else:
            inside = ", ".join(self.names) if self.names else "neither names nor wavelengths stated"
        return f"{counted(num_bands, 'band')} ({inside})"


class Raster:
    """An open image. `options` choose its bands, their axis and their nodata value. Use as a context manager.

    Raises: ValueError if a file cannot be read, band files do not share one grid, or bands, axes, type or nodata of
    the options do not fit.
    """

    def __init__(self, source: ImageSource, options: ReadOptions) -> None:
        self.source = source
        self._axes = options.axes or "chw"
        self.nodata_given = options.nodata is not None
        self._slab: _Slab | None = None
        is_array = all(file.suffix.lower() == ".npy" for file in source.files)
        self._planes: Planes = NpyPlanes(source) if is_array else GdalPlanes(source)
        try:
            self._bands = self._choose_bands(options)
            self.info = self._describe()
            _check_axes(source, options.axes, self._lengths()["c"], self.info)
            self._nodata = self._choose_nodata(options.nodata)
        except BaseException:
            self._planes.close()
            raise

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._planes.close()

    def read(
        self, bands: Sequence[int], row: int, col: int, height: int, width: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values (C, H, W) of a window in the type of the file, and a mask (H, W) of its valid pixels.

        A pixel is valid if no band is nodata or transparent there.

        Raises: ValueError if the file is damaged.
        """
        slab = self._slab
        if slab is None or not slab.holds(bands, row, col, height, width):
            self._slab = slab = None  # free its memory before the next slab is read
            self._slab = slab = self._read_slab(bands, row, col, height, width)
        columns = np.s_[..., col - slab.col : col - slab.col + width]
        return np.ascontiguousarray(slab.values[columns]), np.ascontiguousarray(slab.valid[columns])

    def window_georeference(self, row: int, col: int) -> dict[str, Any]:
        """Return `crs` and `transform` of the window that starts at `row`, `col`; empty without a georeference."""
        return self._planes.window_georeference(row, col) if self._axes == "chw" else {}

    def georeference(self) -> Georeference:
        """Return the position of the whole image on Earth."""
        return self._planes.georeference() if self._axes == "chw" else Georeference()

    @property
    def nodata(self) -> list[Any]:
        """Nodata value of each band in the type of the file, or None."""
        return self._nodata

    def _read_slab(self, bands: Sequence[int], row: int, col: int, height: int, width: int) -> _Slab:
        """Read a window. If every window decodes whole rows, read as far to the right as memory allows."""
        if self._planes.reads_whole_rows:
            bytes_per_column = len(bands) * height * np.dtype(self.info.dtype).itemsize
            width = min(max(width, MAX_SLAB_BYTES // bytes_per_column), self.info.width - col)
        rows, cols = slice(row, row + height), slice(col, col + width)
        chosen = [self._bands[band] for band in bands]
        values_CHW = self._read_axes(chosen, rows, cols)
        valid_HW = np.ones((height, width), bool)
        if self._axes == "chw":
            valid_HW = self._planes.valid(chosen, rows, cols)
        for values_HW, nodata in zip(values_CHW, (self._nodata[band] for band in bands), strict=True):
            if nodata is not None:
                valid_HW &= values_HW != nodata
        return _Slab(tuple(bands), row, col, values_CHW, valid_HW)

    def _read_axes(self, chosen: Sequence[int], rows: slice, cols: slice) -> NDArray[Any]:
        """Return the window (C, H, W), for any order of axes in the file."""
        if self._axes == "chw":
            return self._planes.read(chosen, rows, cols)
        span = {"c": slice(min(chosen), max(chosen) + 1), "h": rows, "w": cols}
        first, second, third = (span[axis] for axis in self._axes)
        block = self._planes.read(range(first.start, first.stop), second, third)
        block_CHW = block.transpose([self._axes.index(axis) for axis in "chw"])
        return block_CHW[[band - min(chosen) for band in chosen]]

    def _choose_bands(self, options: ReadOptions) -> list[int]:
        """Return indices along the band axis."""
        planes = self._planes
        num_bands = self._lengths()["c"]
        everything = list(range(num_bands))
        names = [info.name for info in planes.infos] if self._axes == "chw" else [""] * num_bands
        if options.bands:
            chosen = [_find_band(self.source, name, names) for name in options.bands]
        # GDAL declares the last of four unlabelled 8-bit bands as alpha, although it may be near infrared.
        elif self._axes != "chw" or len(options.wavelengths_nm or ()) == num_bands:
            chosen = everything
        else:
            chosen = [plane for plane in everything if not planes.is_alpha(plane)]
        if self._axes == "chw":
            planes.treat_as_data(chosen)
        return chosen

    def _lengths(self) -> dict[str, int]:
        shape = (len(self._planes.infos), self._planes.height, self._planes.width)
        return dict(zip(self._axes, shape, strict=True))

    def _describe(self) -> RasterInfo:
        lengths = self._lengths()
        # If bands are along another axis, a plane is not a band, and all bands have the metadata of the first plane.
        infos = self._planes.infos
        infos = [infos[band] for band in self._bands] if self._axes == "chw" else [infos[0]] * len(self._bands)
        dtypes = {info.dtype for info in infos}
        if len(dtypes) > 1 or not dtypes <= set(STORED_DTYPES):
            raise ValueError(
                f"{self.source.path} holds {', '.join(sorted(dtypes))}, expected one of "
                f"{', '.join(STORED_DTYPES)} for all bands; convert it (gdal_translate -ot UInt16 or Float32)"
            )
        names = tuple(info.name for info in infos)
        return RasterInfo(
            height=lengths["h"],
            width=lengths["w"],
            dtype=dtypes.pop(),
            names=names if all(names) and len(set(names)) == len(names) else None,
            wavelengths_nm=_stated_wavelengths(self.source, [info.wavelength_nm for info in infos]),
            scales=tuple(info.scale for info in infos),
            offsets=tuple(info.offset for info in infos),
            states_nodata=any(info.nodata is not None for info in infos)
            or (self._axes == "chw" and self._planes.has_mask_band),
        )

    def _choose_nodata(self, option: float | None) -> list[Any]:
        """Return the nodata value of each band in the type of the file, or None if that type cannot hold it."""
        if option is not None:
            value = _in_dtype(option, self.info.dtype)
            if value is None:
                raise ValueError(
                    f"got --nodata {option:g} but {self.source.path} holds {self.info.dtype}; give a value of "
                    "this type"
                )
            return [value] * len(self._bands)
        infos = self._planes.infos
        stated = [infos[band if self._axes == "chw" else 0].nodata for band in self._bands]
        return [None if value is None else _in_dtype(value, self.info.dtype) for value in stated]


@dataclass(frozen=True)
class _Slab:
    """Pixels that were read in one call."""

    bands: tuple[int, ...]
    row: int
    col: int
    values: NDArray[Any]
    """(C, H, W)"""
    valid: NDArray[np.bool_]
    """(H, W)"""

    def holds(self, bands: Sequence[int], row: int, col: int, height: int, width: int) -> bool:
        slab_height, slab_width = self.valid.shape
        same_rows = (self.bands, self.row, slab_height) == (tuple(bands), row, height)
        return same_rows and self.col <= col and col + width <= self.col + slab_width


def _find_band(source: ImageSource, wanted: str, names: Sequence[str]) -> int:
    """Return the index of a band, given its number from 1 or its name."""
    if wanted.isdecimal() and wanted not in names:
        if not 1 <= int(wanted) <= len(names):
            raise ValueError(
                f"got --bands {wanted} but {source.path} holds bands 1 to {len(names)}; give numbers of these bands"
            )
        return int(wanted) - 1
    for pool, name in ((list(names), wanted), ([each.lower() for each in names], wanted.lower())):
        if pool.count(name) == 1:
            return pool.index(name)
    known = ", ".join(filter(None, names)) or "none"
    raise ValueError(
        f"got --bands {wanted} but {source.path} names {known}; give a name that only one band has, or numbers from 1"
    )


def _stated_wavelengths(source: ImageSource, stated: Sequence[float | None]) -> tuple[float, ...] | None:
    known = tuple(nm for nm in stated if nm is not None)
    if 0 < len(known) < len(stated):
        raise ValueError(
            f"{source.path} states a wavelength for {len(known)} of its {len(stated)} bands; "
            "state it for all (band tag `wavelength`), or leave the other bands out with --bands"
        )
    return known or None


def _check_axes(source: ImageSource, axes: str | None, num_bands: int, info: RasterInfo) -> None:
    """Check that bands are along the right axis. A wrong axis means very many bands with very few rows or columns.

    Raises: ValueError if the shape is implausible.
    """
    short, long = sorted((info.height, info.width))
    if info.names or info.wavelengths_nm or long < MIN_TILE_PX:
        return
    shape = f"{counted(num_bands, 'band')} of {info.height} x {info.width} px"
    better = _axes_with_bands_on(axes or "chw", "h" if info.height == short else "w")
    if axes is None and min(num_bands, long) > 2 * short:
        raise ValueError(
            f"{source.path} would be {shape}, which looks like {counted(short, 'band')} along another axis; "
            f"give --axes {better}, or --axes chw if this is right"
        )
    if axes is not None and num_bands > short and short < MIN_TILE_PX:
        raise ValueError(
            f"got --axes {axes}, with which {source.path} would be {shape}, narrower than any tile; "
            f"give --axes {better}"
        )


def _axes_with_bands_on(axes: str, band_axis: str) -> str:
    """Return `axes` with the bands on another axis, and rows before columns."""
    remaining = iter("hw")
    return "".join("c" if axis == band_axis else next(remaining) for axis in axes)


def _in_dtype(value: float, dtype: str) -> Any:
    with np.errstate(all="ignore"):
        cast = np.array(value).astype(dtype)[()]
    return cast if np.dtype(dtype).kind == "f" or float(cast) == value else None
