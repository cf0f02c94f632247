"""Planes of pixels that are read window by window: the interface of every file type, and NumPy files.

A plane is a band, unless the file keeps its bands along another axis. `gdal.py` reads all other files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from msvae.rasters.sources import ImageSource

MAX_MAPPED_BYTES = 4 * 2**20
"""Bytes that are read from one map of a file. Pages of a map count as memory of the process until it is closed."""


@dataclass(frozen=True)
class PlaneInfo:
    """Metadata of one plane."""

    dtype: str
    name: str = ""
    """Name that the file states, or an empty string."""
    wavelength_nm: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    nodata: float | None = None


@dataclass(frozen=True)
class Georeference:
    """Position of an image on Earth, in the terms of GDAL; empty if the image has none."""

    profile: Mapping[str, Any] = field(default_factory=dict)
    """`crs`, `transform`, `gcps` and `rpcs`, as far as they are known."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """The tag AREA_OR_POINT, if the file has it. It defines the point of a pixel to which the transform refers."""


class Planes(Protocol):
    """An open image of one or more files, as an array (planes, rows, columns)."""

    height: int
    width: int
    reads_whole_rows: bool
    """True if reading a window takes as long as reading its rows over the whole width."""
    infos: list[PlaneInfo]

    @property
    def has_mask_band(self) -> bool:
        """True if a mask band, which is not a plane, hides pixels."""

    def close(self) -> None:
        """Close all files."""

    def treat_as_data(self, planes: Sequence[int]) -> None:
        """Read these planes as data, even if the file declares one as transparency."""

    def is_alpha(self, plane: int) -> bool:
        """Return True if a plane holds transparency."""

    def read(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[Any]:
        """Return values (planes, rows, columns). Raises: ValueError if the file is damaged."""

    def valid(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[np.bool_]:
        """Return a mask (rows, columns) that is False where transparency or a mask band hides a pixel."""

    def window_georeference(self, row: int, col: int) -> dict[str, Any]:
        """Return `crs` and `transform` of the window that starts at `row`, `col`, if known."""

    def georeference(self) -> Georeference:
        """Return the position of the whole image."""


class NpyPlanes:
    """The planes of one array (C, H, W), or of one array (H, W) per band file. Nothing is ever unpickled.

    Raises: ValueError if a file holds no numeric array, or band files differ in size.
    """

    def __init__(self, source: ImageSource) -> None:
        shapes = [_map(file).shape for file in source.files]
        if source.one_file_per_band and len(set(shapes)) > 1:
            raise ValueError(f"{source.path} holds arrays of shapes {shapes}; the bands must share one grid")
        if source.one_file_per_band and shapes[0][0] > 1:
            raise ValueError(f"{source.files[0]} has shape {shapes[0]}, expected (H, W) in a file of one band")
        num_planes, self.height, self.width = shapes[0]
        self._planes = [(file, index) for file in source.files for index in range(num_planes)]
        self.reads_whole_rows, self.has_mask_band = True, False
        self.infos = [
            PlaneInfo(_map(file).dtype.name, file.stem if source.one_file_per_band else "") for file, _ in self._planes
        ]

    def close(self) -> None:
        """Do nothing: no file stays open between two windows."""

    def treat_as_data(self, planes: Sequence[int]) -> None:
        """Do nothing: every plane is data."""

    def is_alpha(self, plane: int) -> bool:
        """Return False: an array cannot state transparency."""
        return False

    def read(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[Any]:
        """Return values (planes, rows, columns)."""
        shape = (len(planes), rows.stop - rows.start, cols.stop - cols.start)
        values = np.empty(shape, self.infos[planes[0]].dtype)
        mapped_file, mapped_bytes = None, 0
        for i, plane in enumerate(planes):
            file, index = self._planes[plane]
            if file != mapped_file or mapped_bytes > MAX_MAPPED_BYTES:
                array_CHW, mapped_file, mapped_bytes = _map(file), file, 0
            values[i] = array_CHW[index, rows, cols]
            mapped_bytes += shape[1] * array_CHW.strides[1]
        return values

    def valid(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[np.bool_]:
        """Return True everywhere: an array has neither transparency nor a mask band."""
        return np.ones((rows.stop - rows.start, cols.stop - cols.start), bool)

    def window_georeference(self, row: int, col: int) -> dict[str, Any]:
        """Return nothing: an array has no position on Earth."""
        return {}

    def georeference(self) -> Georeference:
        """Return an empty position: an array has none."""
        return Georeference()


def mapped_array(file: Path) -> NDArray[Any]:
    """Map the array of a .npy file from disk. Nothing is ever unpickled.

    Raises: ValueError if the file does not hold exactly one numeric array.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"{file} cannot be opened ({error}); save a numeric array with numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{file} is an archive of arrays; save a single one with numpy.save")
    mapped: NDArray[Any] = array
    return mapped


def _map(file: Path) -> NDArray[Any]:
    array = mapped_array(file)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise ValueError(f"{file} has shape {array.shape}, expected (bands, height, width); save one image per file")
    return array
