"""Which pixels of an image are leaf: by mask file, by nodata, NaN or a mask band, or an expression over its bands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.rasters.cleaning import BitMask
from msvae.rasters.expression import Expression
from msvae.rasters.mask_file import MaskFile, find_mask_file
from msvae.rasters.options import ReadOptions
from msvae.rasters.pixel_format import Layout
from msvae.rasters.raster import Raster
from msvae.rasters.sources import MASK_ENDING, ImageSource
from msvae.shards.reflectance import BRIGHT, too_bright

WINDOW_ROWS, WINDOW_BYTES = 256, 2**23


@dataclass(frozen=True)
class MaskRule:
    """How the leaf mask of one image is found: a file, an expression, or with neither its nodata and NaN."""

    file: Path | None = None
    expression: Expression | None = None
    must_see_background: bool = False
    """Nothing says that this image has a mask except the NaN that it should hold."""
    threshold: float | None = None
    """Found for this image, where the expression asks for it."""
    prepared: BitMask | None = None
    """The finished mask, where the whole image had to be seen first."""


def parse_mask_option(text: str) -> Expression | None:
    """None for `auto`. Raises: ValueError for anything that is neither that nor an expression."""
    return None if text.strip().lower() == "auto" else Expression.parse(text)


def choose_mask(image: Raster, expression: Expression | None, mask_files: str | None) -> MaskRule:
    """The rule for one image.

    Raises: ValueError when there is no way to tell leaf from background, or the mask file does not fit the image.
    """
    rule = stated_mask(image, expression, mask_files)
    if rule is None and np.dtype(image.info.dtype).kind != "f":
        raise no_mask_error(image.source)
    return rule or MaskRule(must_see_background=True)


def stated_mask(image: Raster, expression: Expression | None, mask_files: str | None) -> MaskRule | None:
    """The rule that options, files or the image itself state for one image; None where at most NaN can tell.

    Raises: ValueError when a mask file is missing, of another kind, or does not fit the image.
    """
    if expression is not None:
        return MaskRule(expression=expression)
    file = find_mask_file(image.source, mask_files)
    if file is not None:
        with MaskFile(file) as mask:
            mask.check(image)
        return MaskRule(file=file)
    if image.info.states_nodata:
        return MaskRule()
    # of a value that nobody but the options knows, a slip must not make everything leaf
    return MaskRule(must_see_background=True) if image.nodata_given else None


def no_mask_error(source: ImageSource) -> ValueError:
    """For an image in which nothing tells leaf from background."""
    return ValueError(
        f"{source.path} has no leaf mask (no {source.stem}{MASK_ENDING}.png or .tif beside it, no nodata, no "
        f"mask band, no NaN); "
        "put a mask file there, or give --mask 'ndvi>0.10' or another index, or --nodata with the value off the leaf"
    )


class MaskedImage:
    """An open image with its leaf mask. Use as a context manager."""

    def __init__(
        self, source: ImageSource, positions: tuple[int, ...], rule: MaskRule, layout: Layout, options: ReadOptions
    ) -> None:
        self._positions = positions
        self._rule = rule
        self._layout = layout
        self._num_leaf_values = self._num_bright_values = 0
        self._looks_for_brightness = options.scale is None and np.dtype(layout.source_dtype).kind == "f"
        self._bands = rule.expression.band_indices(layout.bands) if rule.expression else {}
        with ExitStack() as stack:
            self.raster = stack.enter_context(Raster(source, options))
            self._mask_file = stack.enter_context(MaskFile(rule.file)) if rule.file else None
            self._open_files = stack.pop_all()

    def __enter__(self) -> MaskedImage:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._open_files.close()

    def read(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Stored values (C, H, W), those that are not finite as 0, and leaf mask (H, W) of a window.

        Raises: ValueError when a file is damaged.
        """
        stored_CHW, valid_HW = self._read_stored(row, col, height, width)
        if self._rule.prepared is not None:
            leaf_HW = self._rule.prepared.read(row, col, height, width)
        else:
            leaf_HW = valid_HW & self._leaf(stored_CHW, row, col)
        self._look_for_brightness(stored_CHW, leaf_HW)
        return stored_CHW, leaf_HW

    def read_leaf(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        """Leaf mask (H, W) of a window. Bands are read, unless they were before, so that damage is found early.

        Raises: ValueError when a file is damaged.
        """
        if self._rule.prepared is None or self._looks_for_brightness:
            return self.read(row, col, height, width)[1]
        return self._rule.prepared.read(row, col, height, width)

    def check_reflectance(self) -> None:
        """Raises: ValueError when what was read so far of a float raster can be no reflectance."""
        if 2 * self._num_bright_values > self._num_leaf_values:
            raise too_bright(self.raster.source.path)

    def quantity_windows(self) -> Iterator[NDArray[np.float64]]:
        """What the threshold of this image is sought for, at its valid pixels (P,), window by window."""
        assert self._rule.expression is not None
        for row, height in self._window_rows():
            for col, width in self._window_columns():
                stored_CHW, valid_HW = self._read_stored(row, col, height, width)
                quantity_HW = self._rule.expression.quantity(self._reflectance(stored_CHW))
                yield quantity_HW[valid_HW & np.isfinite(quantity_HW)]

    def leaf_strips(self) -> Iterator[NDArray[np.bool_]]:
        """Leaf mask of the whole image as full-width strips."""
        for row, height in self._window_rows():
            pieces = []
            for col, width in self._window_columns():
                stored_CHW, valid_HW = self._read_stored(row, col, height, width)
                pieces.append(valid_HW & self._leaf(stored_CHW, row, col))
            yield np.concatenate(pieces, axis=1)

    def _window_rows(self) -> Iterator[tuple[int, int]]:
        height = self.raster.info.height
        return ((row, min(WINDOW_ROWS, height - row)) for row in range(0, height, WINDOW_ROWS))

    def _window_columns(self) -> Iterator[tuple[int, int]]:
        step, width = max(64, WINDOW_BYTES // (8 * WINDOW_ROWS * len(self._positions))), self.raster.info.width
        return ((col, min(step, width - col)) for col in range(0, width, step))

    def _read_stored(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        values_CHW, valid_HW = self.raster.read(self._positions, row, col, height, width)
        stored_CHW = self._layout.store(values_CHW)
        if stored_CHW.dtype.kind == "f":
            finite_CHW = np.isfinite(stored_CHW)
            valid_HW &= finite_CHW.all(axis=0)
            stored_CHW[~finite_CHW] = 0
        return stored_CHW, valid_HW

    def _leaf(self, stored_CHW: NDArray[Any], row: int, col: int) -> Any:
        """What the rule says, whether or not a pixel is valid."""
        if self._mask_file is not None:
            return self._mask_file.read(row, col, *stored_CHW.shape[1:])
        if (expression := self._rule.expression) is not None:
            return expression.leaf(self._reflectance(stored_CHW), self._rule.threshold)
        return True

    def _reflectance(self, stored_CHW: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
        values = self._layout.reflectance(stored_CHW, list(self._bands.values()))
        return dict(zip(self._bands, values, strict=True))

    def _look_for_brightness(self, stored_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> None:
        if self._looks_for_brightness:
            reflectance_CP = self._layout.reflectance(stored_CHW[:, leaf_HW])
            self._num_leaf_values += reflectance_CP.size
            self._num_bright_values += int(np.count_nonzero(reflectance_CP > BRIGHT))
