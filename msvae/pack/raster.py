"""Rasters through GDAL: what they state about their bands, and windows of their pixels.

Shapes: C bands, H and W pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from msvae.pack.sources import ImageSource

NM_PER_UNIT = {"nm": 1.0, "nanometer": 1.0, "nanometre": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3}
NM_PER_UNIT |= {"micrometer": 1e3, "micrometre": 1e3, "micron": 1e3}
STORED_DTYPES = {name: name for name in ("uint8", "uint16", "int16", "float32")} | {"float64": "float32"}
GRID_TOLERANCE_PX = 0.01
MAX_SLAB_BYTES = 64 * 2**20


@contextmanager
def gdal_session() -> Iterator[None]:
    """GDAL with bounded memory (MB), and silent about rasters without a place on Earth."""
    with rasterio.Env(GDAL_CACHEMAX=256), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@dataclass(frozen=True)
class RasterInfo:
    """What an image states about itself; one entry a band in the tuples."""

    height: int
    width: int
    dtype: str
    """Type in which its tiles are stored."""
    names: tuple[str, ...] | None
    wavelengths_nm: tuple[float, ...] | None
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    states_nodata: bool

    def describe_bands(self) -> str:
        """`4 bands (475, 560, 668, 840 nm)`, for messages."""
        num_bands = len(self.scales)
        if self.wavelengths_nm:
            inside = ", ".join(f"{nm:.0f}" for nm in self.wavelengths_nm) + " nm"
        else:
            inside = ", ".join(self.names) if self.names else "neither names nor wavelengths stated"
        return f"{num_bands} band{'s' if num_bands > 1 else ''} ({inside})"


class Raster:
    """An open image. Use as a context manager.

    Args: `num_wanted`: how many bands are asked for, if known; it tells a fourth band from transparency.
    Raises: ValueError when a file cannot be read, band files do not share one grid, or a type is not supported.
    """

    def __init__(self, source: ImageSource, num_wanted: int | None = None) -> None:
        self.source = source
        self._slab: tuple[Any, tuple[NDArray[Any], NDArray[np.bool_]]] | None = None
        with ExitStack() as stack:
            self._datasets = [stack.enter_context(_open(file)) for file in source.files]
            self._alpha = self._find_alpha(num_wanted)
            self._planes = self._find_planes()
            self.info = self._describe()
            self._open_files = stack.pop_all()

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._open_files.close()

    def read(self, bands: Sequence[int], row: int, col: int, size_px: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Stored values (C, H, W) of the chosen bands in a square window, non-finite ones as 0, and where all
        bands are valid (H, W): neither nodata, nor transparent, nor NaN or infinite.

        Raises: ValueError when the file is damaged.
        """
        slab_px = self._slab_width(len(bands), size_px)
        start = col // slab_px * slab_px if slab_px > size_px else col
        window = Window(
            start, row, min(slab_px + (size_px if slab_px > size_px else 0), self.info.width - start), size_px
        )
        if self._slab is None or self._slab[0] != (bands, window):
            self._slab = ((bands, window), self._read_window(bands, window))
        stored_CHW, valid_HW = self._slab[1]
        columns = np.s_[..., col - start : col - start + size_px]
        return np.ascontiguousarray(stored_CHW[columns]), np.ascontiguousarray(valid_HW[columns])

    def _slab_width(self, num_bands: int, size_px: int) -> int:
        """Columns to read at once: GDAL decodes all of a strip for any window of it, so take as many as fit."""
        if all(dataset.block_shapes[0][1] < dataset.width for dataset in self._datasets):
            return size_px
        bytes_per_column = num_bands * size_px * np.dtype(self.info.dtype).itemsize
        return max(1, MAX_SLAB_BYTES // (bytes_per_column * size_px)) * size_px

    def _read_window(self, bands: Sequence[int], window: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        chosen = [self._planes[band] for band in bands]
        stored, valid_HW = [], np.ones((window.height, window.width), bool)
        for file, planes in groupby(chosen, key=lambda plane: plane[0]):
            dataset, indices = self._datasets[file], [index for _, index in planes]
            try:
                stored.append(dataset.read(indices, window=window))
                if alpha := [index for at, index in self._alpha if at == file]:
                    valid_HW &= (dataset.read(alpha, window=window) > 0).all(axis=0)
                if masked := [index for index in indices if _is_masked(dataset, index)]:
                    valid_HW &= (dataset.read_masks(masked, window=window) > 0).all(axis=0)
            except RasterioError as error:
                raise ValueError(
                    f"{dataset.name} cannot be read at row {window.row_off} ({error.__cause__ or error}); "
                    "the file is truncated or damaged, copy it again"
                ) from error
        with np.errstate(over="ignore"):
            stored_CHW = np.concatenate(stored).astype(self.info.dtype, copy=False)
        if stored_CHW.dtype.kind == "f":
            finite_CHW = np.isfinite(stored_CHW)
            valid_HW &= finite_CHW.all(axis=0)
            stored_CHW[~finite_CHW] = 0
        return stored_CHW, valid_HW

    def place(self, row: int, col: int) -> dict[str, Any]:
        """`crs` and `transform` of the window that starts there; empty when the image is not georeferenced."""
        dataset = self._datasets[0]
        place: dict[str, Any] = {}
        if dataset.crs:
            place["crs"] = dataset.crs.to_string()
        if not dataset.transform.is_identity:
            a, b, _, d, e, _ = dataset.transform[:6]
            x, y = _apply(dataset.transform, col, row)
            place["transform"] = [float(value) for value in (a, b, x, d, e, y)]
        return place

    def _find_alpha(self, num_wanted: int | None) -> list[tuple[int, int]]:
        """(file, GDAL band number) of every plane that holds transparency."""
        # GDAL calls the last of four unlabelled 8-bit bands alpha, although it may well be near infrared.
        all_are_bands = not self.source.one_file_per_band and num_wanted == self._datasets[0].count
        return [
            (file, index)
            for file, dataset in enumerate(self._datasets)
            for index, meaning in zip(dataset.indexes, dataset.colorinterp, strict=True)
            if meaning == ColorInterp.alpha and not all_are_bands and not _labelled(dataset, index)
        ]

    def _find_planes(self) -> list[tuple[int, int]]:
        """(file, GDAL band number) of every band. Of a band file only the first plane is data."""
        if self.source.one_file_per_band:
            return [(file, 1) for file in range(len(self._datasets))]
        return [(0, index) for index in self._datasets[0].indexes if (0, index) not in self._alpha]

    def _describe(self) -> RasterInfo:
        first = self._datasets[0]
        for other in self._datasets[1:]:
            _check_same_grid(first, other)
        pairs = [(self._datasets[file], index) for file, index in self._planes]
        dtypes = {dataset.dtypes[index - 1] for dataset, index in pairs}
        if len(dtypes) > 1 or not dtypes <= set(STORED_DTYPES):
            raise ValueError(
                f"{self.source.path} holds {', '.join(sorted(dtypes))}, expected one of "
                f"{', '.join(STORED_DTYPES)} for all bands; convert it (gdal_translate -ot UInt16 or Float32)"
            )
        names = [dataset.descriptions[index - 1] or "" for dataset, index in pairs]
        if self.source.one_file_per_band:
            names = [file.stem for file in self.source.files]
        return RasterInfo(
            height=first.height,
            width=first.width,
            dtype=STORED_DTYPES[dtypes.pop()],
            names=tuple(names) if all(names) and len(set(names)) == len(names) else None,
            wavelengths_nm=_stated_wavelengths(self.source, pairs),
            scales=tuple(float(dataset.scales[index - 1]) for dataset, index in pairs),
            offsets=tuple(float(dataset.offsets[index - 1]) for dataset, index in pairs),
            states_nodata=any(dataset.nodatavals[index - 1] is not None for dataset, index in pairs),
        )


def _open(path: Path) -> Any:
    try:
        dataset = rasterio.open(path)
    except RasterioError as error:
        raise ValueError(
            f"{path} cannot be opened ({error}); it is truncated or not a raster, copy it again or leave it out"
        ) from error
    if dataset.driver == "ENVI" and "file_compression" not in dataset.tags(ns="ENVI"):
        # GDAL reads what is missing from a raw file as zeros.
        num_bytes = dataset.height * dataset.width * sum(np.dtype(name).itemsize for name in dataset.dtypes)
        if path.stat().st_size < num_bytes:
            raise ValueError(
                f"{path} holds {path.stat().st_size} bytes but its header promises {num_bytes}; "
                "it is truncated, copy it again"
            )
    return dataset


def _check_same_grid(first: Any, other: Any) -> None:
    if (first.height, first.width) != (other.height, other.width):
        raise ValueError(
            f"{other.name} has {other.height} x {other.width} px but {first.name} has "
            f"{first.height} x {first.width} px; resample the bands to one grid"
        )
    if first.transform.is_identity or other.transform.is_identity:
        return
    corners = [(0, 0), (first.width, 0), (0, first.height)]
    of_first = [_apply(~first.transform, *_apply(other.transform, *corner)) for corner in corners]
    shift_px = max(math.dist(there, here) for there, here in zip(of_first, corners, strict=True))
    if first.crs != other.crs or shift_px > GRID_TOLERANCE_PX:
        raise ValueError(
            f"{other.name} lies on another grid than {first.name} (off by {shift_px:.2f} px, {other.crs} and "
            f"{first.crs}); align the bands to one grid"
        )


def _apply(transform: Any, x: float, y: float) -> tuple[float, float]:
    a, b, c, d, e, f = transform[:6]
    return a * x + b * y + c, d * x + e * y + f


def _is_masked(dataset: Any, index: int) -> bool:
    """Whether nodata or a mask band of GDAL's own tells which pixels are valid; transparency is read apart."""
    flags = dataset.mask_flag_enums[index - 1]
    return MaskFlags.all_valid not in flags and MaskFlags.alpha not in flags


def _labelled(dataset: Any, index: int) -> bool:
    description = (dataset.descriptions[index - 1] or "alpha").lower()
    return "alpha" not in description or _wavelength_nm(dataset, index) is not None


def _stated_wavelengths(source: ImageSource, pairs: list[tuple[Any, int]]) -> tuple[float, ...] | None:
    stated = [_wavelength_nm(dataset, index) for dataset, index in pairs]
    known = tuple(nm for nm in stated if nm is not None)
    if 0 < len(known) < len(stated):
        raise ValueError(
            f"{source.path} states a wavelength for {len(known)} of its {len(stated)} bands; "
            "state it for all (band tag `wavelength`), or drop the other bands (gdal_translate -b)"
        )
    return known or None


def _wavelength_nm(dataset: Any, index: int) -> float | None:
    """From the band's tags `wavelength` and `wavelength_units`, else from GDAL's IMAGERY domain."""
    tags = {name.lower(): value for name, value in dataset.tags(index).items()}
    text, unit = tags.get("wavelength"), tags.get("wavelength_units", "unknown").strip().lower()
    if text is None:
        text, unit = dataset.tags(index, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM"), "um"
    if text is None:
        return None
    try:
        value = float(text)
        # Reflected light spans 0.3 to 2.5 um: without a unit the size of the number tells it.
        factor = (1.0 if value > 100 else 1e3) if unit == "unknown" else NM_PER_UNIT[unit.removesuffix("s")]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{dataset.name}: band {index} states wavelength {text!r} in {unit!r}, expected a number in nm or um; "
            "correct the band tags `wavelength` and `wavelength_units`"
        ) from error
    return round(value * factor, 4)
