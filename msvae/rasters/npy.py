"""NumPy files as planes of pixels: (C, H, W) arrays, or with one file per band (H, W) arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from msvae.rasters.planes import Georeference, PlaneFacts
from msvae.rasters.sources import ImageSource

MAX_MAPPED_BYTES = 4 * 2**20
"""Pages of a map count as memory of the process until it is closed."""


class NpyPlanes:
    """The planes of one array, or one plane of each band file. Nothing in it is ever unpickled.

    Raises: ValueError when a file holds no numeric array or band files differ in size.
    """

    def __init__(self, source: ImageSource) -> None:
        self._files = source.files
        shapes = [_map(file).shape for file in source.files]
        if source.one_file_per_band and len(set(shapes)) > 1:
            raise ValueError(f"{source.path} holds arrays of shapes {shapes}; the bands must share one grid")
        if source.one_file_per_band and shapes[0][0] > 1:
            raise ValueError(f"{source.files[0]} has shape {shapes[0]}, expected (H, W) in a file of one band")
        num_planes, self.height, self.width = shapes[0]
        self._planes = [(file, index) for file in source.files for index in range(num_planes)]
        self.reads_whole_rows, self.has_mask_band = True, False
        self.facts = [
            PlaneFacts(_map(file).dtype.name, file.stem if source.one_file_per_band else "")
            for file in source.files
            for _ in range(num_planes)
        ]

    def close(self) -> None:
        """Nothing stays open between two windows."""

    def take_as_data(self, planes: Sequence[int]) -> None:
        """Every plane is data."""

    def is_alpha(self, plane: int) -> bool:
        """An array does not tell."""
        return False

    def read(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[Any]:
        """Values (planes, rows, columns)."""
        shape = (len(planes), rows.stop - rows.start, cols.stop - cols.start)
        values = np.empty(shape, self.facts[planes[0]].dtype)
        mapped_file, mapped_bytes = None, 0
        for i, plane in enumerate(planes):
            file, index = self._planes[plane]
            if file != mapped_file or mapped_bytes > MAX_MAPPED_BYTES:
                array_CHW, mapped_file, mapped_bytes = _map(file), file, 0
            values[i] = array_CHW[index, rows, cols]
            mapped_bytes += shape[1] * array_CHW.strides[1]
        return values

    def valid(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[np.bool_]:
        """Nothing but a value hides a pixel."""
        return np.ones((rows.stop - rows.start, cols.stop - cols.start), bool)

    def place(self, row: int, col: int) -> dict[str, Any]:
        """An array lies nowhere on Earth."""
        return {}

    def georeference(self) -> Georeference:
        """An array lies nowhere on Earth."""
        return Georeference()


def mapped_array(file: Path) -> NDArray[Any]:
    """The array of a file, on disk. Nothing in it is ever unpickled.

    Raises: ValueError when the file is none of a single numeric array.
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
        raise ValueError(f"{file} has shape {array.shape}, expected (bands, height, width); save one image a file")
    return array
