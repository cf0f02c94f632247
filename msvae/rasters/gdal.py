"""Planes of pixels in the files that GDAL reads, and the metadata of each plane."""

from __future__ import annotations

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from msvae.rasters.planes import Georeference, PlaneInfo
from msvae.rasters.sources import ImageSource

CACHE_BYTES = 32 * 2**20
"""Cache of GDAL for decoded blocks. It is small because a row of tiles is read at once where that saves decoding."""
MAX_OPEN_FILES = 64
GRID_TOLERANCE_PX = 0.01
RAW_DRIVERS = ("ENVI", "EHdr")
NM_PER_UNIT = {"nm": 1.0, "nanometer": 1.0, "nanometre": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3}
NM_PER_UNIT |= {"micrometer": 1e3, "micrometre": 1e3, "micron": 1e3}
ENVI_WAVELENGTH = re.compile(r"[\d.]+ *\w*")
"""Name that GDAL makes up for a band if an ENVI header states wavelengths but no names: `475 Nanometers`."""


@contextmanager
def gdal_session() -> Iterator[None]:
    """Configure GDAL: bounded memory, mask bands inside their file, no warning about missing georeferences."""
    # rasterio expects bytes here, although GDAL's own setting is in megabytes
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_TIFF_INTERNAL_MASK=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


class GdalPlanes:
    """The planes of one raster, of all pages of a TIFF, or the first plane of each band file.

    Raises: ValueError if a file cannot be read, or band files do not share one grid.
    """

    def __init__(self, source: ImageSource) -> None:
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._paths = [str(file) for file in source.files]
        if not source.one_file_per_band:
            self._paths = _pages(self._dataset(0)) or self._paths
        first = self._dataset(0)
        self.height, self.width = first.height, first.width
        self.reads_whole_rows = first.block_shapes[0][1] >= first.width
        grid = _Grid(first)
        self._planes: list[tuple[int, int]] = []
        self._alpha: list[tuple[int, int]] = []
        self._masked_files: set[int] = set()
        self.infos: list[PlaneInfo] = []
        for file in range(len(self._paths)):
            dataset = self._dataset(file)
            grid.check(dataset)
            self._alpha += [(file, number) for number in dataset.indexes if _is_alpha(dataset, number)]
            if has_mask_band(dataset):
                self._masked_files.add(file)
            # only the first plane of a band file is data
            for number in [1] if source.one_file_per_band else dataset.indexes:
                self._planes.append((file, number))
                self.infos.append(_plane_info(dataset, number, source.one_file_per_band))

    @property
    def has_mask_band(self) -> bool:
        """True if a mask band in one of the files hides pixels."""
        return bool(self._masked_files)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def treat_as_data(self, planes: Sequence[int]) -> None:
        """Read these planes as data, even if GDAL declares one as transparency."""
        self._alpha = [pair for pair in self._alpha if pair not in [self._planes[plane] for plane in planes]]

    def is_alpha(self, plane: int) -> bool:
        """Return True if a plane holds transparency."""
        return self._planes[plane] in self._alpha

    def read(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[Any]:
        """Return values (planes, rows, columns) in the type of the file. Raises: ValueError if the file is damaged."""
        shape = (len(planes), rows.stop - rows.start, cols.stop - cols.start)
        values = np.empty(shape, self.infos[planes[0]].dtype)
        done = 0
        for file, group in groupby((self._planes[plane] for plane in planes), key=lambda pair: pair[0]):
            numbers = [number for _, number in group]
            with _name_damage(self._dataset(file), rows) as dataset:
                dataset.read(numbers, window=_window(rows, cols), out=values[done : done + len(numbers)])
            done += len(numbers)
        return values

    def valid(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[np.bool_]:
        """Return a mask (rows, columns) that is False where transparency or a mask band hides these planes."""
        valid_HW = np.ones((rows.stop - rows.start, cols.stop - cols.start), bool)
        files = {self._planes[plane][0] for plane in planes}
        for file, number in self._alpha:
            if file in files:
                with _name_damage(self._dataset(file), rows) as dataset:
                    valid_HW &= dataset.read(number, window=_window(rows, cols)) > 0
        for file in files & self._masked_files:
            with _name_damage(self._dataset(file), rows) as dataset:
                valid_HW &= dataset.read_masks(1, window=_window(rows, cols)) > 0
        return valid_HW

    def window_georeference(self, row: int, col: int) -> dict[str, Any]:
        """Return `crs` and `transform` of the window that starts at `row`, `col`; empty without a georeference."""
        dataset = self._dataset(0)
        georeference: dict[str, Any] = {}
        if dataset.crs:
            georeference["crs"] = dataset.crs.to_string()
        if not dataset.transform.is_identity:
            a, b, _, d, e, _ = dataset.transform[:6]
            x, y = _apply(dataset.transform, col, row)
            georeference["transform"] = [float(value) for value in (a, b, x, d, e, y)]
        return georeference

    def georeference(self) -> Georeference:
        """Return the position of the whole image, from its first file."""
        dataset = self._dataset(0)
        gcps, crs_of_gcps = dataset.gcps
        profile = {"crs": crs_of_gcps, "gcps": gcps} if gcps else {"crs": dataset.crs}
        if not gcps and not dataset.transform.is_identity:
            profile["transform"] = dataset.transform
        profile["rpcs"] = dataset.rpcs
        tags = {name: value for name, value in dataset.tags().items() if name == "AREA_OR_POINT"}
        return Georeference({name: value for name, value in profile.items() if value}, tags)

    def _dataset(self, file: int) -> Any:
        path = self._paths[file]
        if path not in self._open:
            if len(self._open) == MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[path] = _open(path)
        return self._open[path]


def largest_shift_px(first: Any, other: Any, height: int, width: int) -> float:
    """Return the largest distance between the corners of a grid under two transforms, in pixels of the first."""
    corners = [(0, 0), (width, 0), (0, height)]
    of_first = [_apply(~first, *_apply(other, *corner)) for corner in corners]
    return max(math.dist(there, here) for there, here in zip(of_first, corners, strict=True))


def has_mask_band(dataset: Any) -> bool:
    """Return True if the file has a mask band, which is not a plane."""
    flags = dataset.mask_flag_enums[0]
    return MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags


class _Grid:
    """The grid of the first of several files, which the others must share."""

    def __init__(self, first: Any) -> None:
        self._name, self._shape, self._transform, self._crs = first.name, first.shape, first.transform, first.crs

    def check(self, other: Any) -> None:
        """Check that another file has the same grid. Raises: ValueError if it has not."""
        height, width = self._shape
        if other.shape != self._shape:
            raise ValueError(
                f"{other.name} has {other.height} x {other.width} px but {self._name} has "
                f"{height} x {width} px; resample the bands to one grid"
            )
        if self._transform.is_identity or other.transform.is_identity:
            return
        shift_px = largest_shift_px(self._transform, other.transform, height, width)
        if self._crs != other.crs or shift_px > GRID_TOLERANCE_PX:
            raise ValueError(
                f"{other.name} is on another grid than {self._name} (off by {shift_px:.2f} px, {other.crs} and "
                f"{self._crs}); align the bands to one grid"
            )


def _open(path: str) -> Any:
    try:
        dataset = rasterio.open(path)
    except RasterioError as error:
        raise ValueError(
            f"{path} cannot be opened ({error}); it is truncated or not a raster, copy it again or leave it out"
        ) from error
    if dataset.driver in RAW_DRIVERS and "file_compression" not in dataset.tags(ns="ENVI"):
        # GDAL reads the missing end of a raw file as zeros
        num_bytes = dataset.height * dataset.width * sum(np.dtype(name).itemsize for name in dataset.dtypes)
        if Path(path).stat().st_size < num_bytes:
            raise ValueError(
                f"{path} holds {Path(path).stat().st_size} bytes but its header states {num_bytes}; "
                "it is truncated, copy it again"
            )
    return dataset


def _pages(dataset: Any) -> list[str]:
    """Return the pages of a TIFF that make up one image. GDAL opens the first and lists all, sorted as text."""
    if dataset.driver != "GTiff" or len(dataset.subdatasets) < 2:
        return []
    pages = sorted(dataset.subdatasets, key=lambda name: int(name.split(":")[1]))
    shape = (dataset.shape, dataset.dtypes)
    for page in pages[1:]:
        with _open(page) as opened:
            if (opened.shape, opened.dtypes) != shape:
                raise ValueError(
                    f"{dataset.name} holds {len(pages)} pages, and page {pages.index(page) + 1} has "
                    f"{opened.height} x {opened.width} px of {opened.dtypes[0]} while the first has "
                    f"{dataset.height} x {dataset.width} px of {dataset.dtypes[0]}; save the image alone "
                    "(gdal_translate GTIFF_DIR:1:FILE)"
                )
    return pages


@contextmanager
def _name_damage(dataset: Any, rows: slice) -> Iterator[Any]:
    """Turn an error of GDAL into a ValueError that names the file."""
    try:
        yield dataset
    except RasterioError as error:
        raise ValueError(
            f"{dataset.name} cannot be read at row {rows.start} ({error.__cause__ or error}); "
            "the file is truncated or damaged, copy it again"
        ) from error


def _window(rows: slice, cols: slice) -> Any:
    return Window(cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start)


def _apply(transform: Any, x: float, y: float) -> tuple[float, float]:
    a, b, c, d, e, f = transform[:6]
    return a * x + b * y + c, d * x + e * y + f


def _plane_info(dataset: Any, number: int, named_by_file: bool) -> PlaneInfo:
    return PlaneInfo(
        dtype=dataset.dtypes[number - 1],
        name=Path(dataset.name).stem if named_by_file else _name(dataset, number),
        wavelength_nm=_wavelength_nm(dataset, number),
        scale=_scale(dataset, number),
        offset=float(dataset.offsets[number - 1]),
        nodata=dataset.nodatavals[number - 1],
    )


def _name(dataset: Any, number: int) -> str:
    name: str = dataset.descriptions[number - 1] or ""
    return "" if dataset.driver == "ENVI" and ENVI_WAVELENGTH.fullmatch(name) else name


def _scale(dataset: Any, number: int) -> float:
    """Return GDAL's scale of a band, else one from the reflectance scale factor of an ENVI header."""
    scale = float(dataset.scales[number - 1])
    factor = dataset.tags(ns="ENVI").get("reflectance_scale_factor")
    if factor is None or scale != 1:
        return scale
    try:
        return 1 / float(factor)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{dataset.name} states reflectance scale factor {factor!r}, expected a number such as 10000; "
            "correct the header, or give --scale"
        ) from error


def _is_alpha(dataset: Any, number: int) -> bool:
    if dataset.colorinterp[number - 1] != ColorInterp.alpha:
        return False
    # a band with another name, or with a wavelength, is data that GDAL declares as alpha by mistake
    labelled = "alpha" not in (dataset.descriptions[number - 1] or "alpha").lower()
    return not labelled and _wavelength_nm(dataset, number) is None


def _wavelength_nm(dataset: Any, index: int) -> float | None:
    """Return the wavelength in the band tags `wavelength` and `wavelength_units`, else in GDAL's IMAGERY domain."""
    tags = {name.lower(): value for name, value in dataset.tags(index).items()}
    text, unit = tags.get("wavelength"), tags.get("wavelength_units", "unknown").strip().lower()
    if text is None:
        text, unit = dataset.tags(index, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM"), "um"
    if text is None:
        return None
    try:
        value = float(text)
        # Reflected light is 0.3 to 2.5 um, so a number above 100 without a unit is in nm.
        factor = (1.0 if value > 100 else 1e3) if unit == "unknown" else NM_PER_UNIT[unit.removesuffix("s")]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{dataset.name}: band {index} states wavelength {text!r} in {unit!r}, expected a number in nm or um; "
            "correct the band tags `wavelength` and `wavelength_units`"
        ) from error
    return round(value * factor, 4)
