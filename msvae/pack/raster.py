"""Rasters through GDAL: what they state about their bands, and windows of their pixels.

Shapes: C bands, H and W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
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


@contextmanager
def gdal_session() -> Iterator[None]:
    """GDAL with bounded memory, strict about truncated files, and silent about rasters without a place on Earth."""
    with rasterio.Env(GDAL_CACHEMAX=256, RAW_CHECK_FILE_SIZE="YES"), warnings.catch_warnings():
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
        with ExitStack() as stack:
            self._datasets = [stack.enter_context(_open(file)) for file in source.files]
            self._planes = self._find_planes(num_wanted)
            self.info = self._describe()
            self._open_files = stack.pop_all()

    def __enter__(self) -> Raster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._open_files.close()

    def read(
        self, bands: Sequence[int], row: int, col: int, size_px: int
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Stored values (C, H, W) of the chosen bands in a square window, non-finite ones as 0, and where all
        bands are valid (H, W): neither nodata, nor transparent, nor NaN or infinite.

        Raises: ValueError when the file is damaged.
        """
        window = Window(col, row, size_px, size_px)
        chosen = [self._planes[band] for band in bands]
        stored, valid_HW = [], np.ones((size_px, size_px), bool)
        for file, planes in groupby(chosen, key=lambda plane: plane[0]):
            dataset, indices = self._datasets[file], [index for _, index in planes]
            try:
                stored.append(dataset.read(indices, window=window))
                if masked := [i for i in indices if self._states_validity(file, i)]:
                    valid_HW &= (dataset.read_masks(masked, window=window) > 0).all(axis=0)
            except RasterioError as error:
                raise ValueError(
                    f"{dataset.name} cannot be read at row {row}, column {col} ({error.__cause__ or error}); "
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
            shifted = dataset.transform * rasterio.Affine.translation(col, row)
            place["transform"] = [float(value) for value in shifted[:6]]
        return place

    def _find_planes(self, num_wanted: int | None) -> list[tuple[int, int]]:
        """(file, GDAL band number) of every band. Of a band file only the first plane is data."""
        if self.source.one_file_per_band:
            return [(file, 1) for file in range(len(self._datasets))]
        (dataset,) = self._datasets
        # GDAL calls the last of four unlabelled 8-bit bands alpha, although it may well be near infrared.
        alpha = {
            index
            for index, meaning in zip(dataset.indexes, dataset.colorinterp, strict=True)
            if meaning == ColorInterp.alpha and num_wanted != dataset.count and not _labelled(dataset, index)
        }
        return [(0, index) for index in dataset.indexes if index not in alpha]

    def _states_validity(self, file: int, index: int) -> bool:
        dataset = self._datasets[file]
        flags = dataset.mask_flag_enums[index - 1]
        alpha_is_data = not self.source.one_file_per_band and len(self._planes) == dataset.count
        return MaskFlags.all_valid not in flags and not (MaskFlags.alpha in flags and alpha_is_data)

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


def _open(path: Any) -> Any:
    try:
        return rasterio.open(path)
    except RasterioError as error:
        raise ValueError(
            f"{path} cannot be opened ({error}); it is truncated or not a raster, copy it again or leave it out"
        ) from error


def _check_same_grid(first: Any, other: Any) -> None:
    if (first.height, first.width) != (other.height, other.width):
        raise ValueError(
            f"{other.name} has {other.height} x {other.width} px but {first.name} has "
            f"{first.height} x {first.width} px; resample the bands to one grid"
        )
    if first.transform.is_identity or other.transform.is_identity:
        return
    to_first = ~first.transform * other.transform
    corners = [(0, 0), (first.width, 0), (0, first.height)]
    shift_px = max(max(abs(a - b) for a, b in zip(to_first * c, c, strict=True)) for c in corners)
    if first.crs != other.crs or shift_px > GRID_TOLERANCE_PX:
        raise ValueError(
            f"{other.name} lies on another grid than {first.name} (off by {shift_px:.2f} px, {other.crs} and "
            f"{first.crs}); align the bands to one grid"
        )


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
