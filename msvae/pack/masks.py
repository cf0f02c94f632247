"""Which pixels of an image are leaf: by a mask file, by nodata or NaN, or by a vegetation index."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window

from msvae.pack.expression import IndexExpression
from msvae.pack.layout import Layout
from msvae.pack.raster import Raster, RasterInfo
from msvae.pack.sources import MASK_ENDING, ImageSource

MASK_FILE_ENDINGS = (".png", ".tif", ".tiff")
FLOAT_MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class MaskRule:
    """How the leaf mask of one image is found: a file, an index, or with neither its nodata and NaN."""

    file: Path | None = None
    expression: IndexExpression | None = None
    must_see_background: bool = False
    """Nothing says that this image has a mask except the NaN that it should hold."""


def parse_mask_option(text: str) -> IndexExpression | None:
    """None for `auto`. Raises: ValueError for anything that is neither that nor an index expression."""
    return None if text.strip().lower() == "auto" else IndexExpression.parse(text)


def choose_mask(source: ImageSource, info: RasterInfo, expression: IndexExpression | None) -> MaskRule:
    """The rule for one image.

    Raises: ValueError when there is no way to tell leaf from background, or the mask file has another size.
    """
    if expression is not None:
        return MaskRule(expression=expression)
    for ending in MASK_FILE_ENDINGS:
        file = source.path.parent / f"{source.stem}{MASK_ENDING}{ending}"
        if file.is_file():
            _check_mask_size(file, source, info)
            return MaskRule(file=file)
    if info.states_nodata:
        return MaskRule()
    if info.dtype == "float32":
        return MaskRule(must_see_background=True)
    raise no_mask_error(source)


def no_mask_error(source: ImageSource) -> ValueError:
    """For an image in which nothing tells leaf from background."""
    return ValueError(
        f"{source.path} has no leaf mask (no {source.stem}{MASK_ENDING}.png or .tif beside it, no nodata, no NaN); "
        "put a mask file there, give --mask 'ndvi>0.10' or another index, or set what is no leaf to nodata or NaN"
    )


class MaskedImage:
    """An open image with its leaf mask. Use as a context manager."""

    def __init__(
        self, source: ImageSource, positions: tuple[int, ...], rule: MaskRule, layout: Layout, num_wanted: int | None
    ) -> None:
        self._positions = positions
        self._rule = rule
        self._layout = layout
        with ExitStack() as stack:
            self.raster = stack.enter_context(Raster(source, num_wanted))
            self._mask_file = stack.enter_context(_open_mask(rule.file)) if rule.file else None
            self._open_files = stack.pop_all()

    def __enter__(self) -> MaskedImage:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._open_files.close()

    def read(self, row: int, col: int, size_px: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Stored values (C, H, W) and leaf mask (H, W) of a square window.

        Raises: ValueError when a file is damaged.
        """
        stored_CHW, valid_HW = self.raster.read(self._positions, row, col, size_px)
        if self._mask_file is not None:
            return stored_CHW, valid_HW & _read_mask(self._mask_file, row, col, size_px)
        if (expression := self._rule.expression) is not None:
            pair = self._layout.reflectance(stored_CHW, expression.band_indices(self._layout.bands))
            return stored_CHW, valid_HW & expression.leaf(*pair)
        return stored_CHW, valid_HW


def _open_mask(file: Path) -> Any:
    try:
        return rasterio.open(file)
    except RasterioError as error:
        raise ValueError(f"mask {file} cannot be opened ({error}); make it again") from error


def _check_mask_size(file: Path, source: ImageSource, info: RasterInfo) -> None:
    with _open_mask(file) as mask:
        if (mask.height, mask.width) != (info.height, info.width):
            raise ValueError(
                f"mask {file} has {mask.height} x {mask.width} px but {source.path} has {info.height} x "
                f"{info.width} px; make the mask at the size of the image"
            )


def _read_mask(mask: Any, row: int, col: int, size_px: int) -> NDArray[np.bool_]:
    """Leaf where any plane but transparency is set: masks are also painted in colour."""
    planes = [
        index for index, meaning in zip(mask.indexes, mask.colorinterp, strict=True) if meaning != ColorInterp.alpha
    ]
    try:
        values = mask.read(planes, window=Window(col, row, size_px, size_px))
    except RasterioError as error:
        raise ValueError(
            f"mask {mask.name} cannot be read at row {row}, column {col} ({error.__cause__ or error}); "
            "it is truncated or damaged, make it again"
        ) from error
    leaf = values > (FLOAT_MASK_THRESHOLD if values.dtype.kind == "f" else 0)
    any_plane_HW: NDArray[np.bool_] = leaf.any(axis=0)
    return any_plane_HW
