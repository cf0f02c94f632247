"""Images with their leaf masks, and the set of all images of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.rasters.expression import Expression
from msvae.rasters.masks import MaskFile, MaskRule, choose_mask
from msvae.rasters.options import ReadOptions
from msvae.rasters.pixel_format import PixelFormat, choose_pixel_format, match_pixel_format
from msvae.rasters.raster import Raster
from msvae.rasters.sources import ImageSource
from msvae.shards.reflectance import BRIGHT, too_bright

WINDOW_ROWS, WINDOW_BYTES = 256, 2**23


@dataclass(frozen=True)
class Image:
    """One image of a set: its files, its bands in the order of the set, and its mask rule."""

    source: ImageSource
    band_indices: tuple[int, ...]
    mask: MaskRule
    height: int
    width: int


@dataclass(frozen=True)
class ImageSet:
    """Images that share one pixel format."""

    images: tuple[Image, ...]
    pixel_format: PixelFormat
    options: ReadOptions

    def open(self, index: int, mask: MaskRule | None = None) -> MaskedImage:
        """Open one image with its own mask rule, or with `mask`."""
        image = self.images[index]
        return MaskedImage(image.source, image.band_indices, mask or image.mask, self.pixel_format, self.options)

    def input_files(self) -> Iterator[Path]:
        """Iterate over all files that determine the pixels and masks."""
        for image in self.images:
            metadata = [Path(f"{file}.aux.xml") for file in image.source.files]
            metadata += [file.with_suffix(".hdr") for file in image.source.files]
            yield from image.source.files
            yield from (file for file in metadata if file.is_file() and file not in image.source.files)
            if image.mask.file is not None:
                yield image.mask.file


def describe_images(sources: Sequence[ImageSource], options: ReadOptions, expression: Expression | None) -> ImageSet:
    """Open every image once and check that all fit together. No pixel is read except in mask files.

    Raises: ValueError if a file cannot be opened, or bands, type, scale or mask of an image do not fit.
    """
    pixel_format, images = None, []
    for source in sources:
        with Raster(source, options) as raster:
            info = raster.info
            if pixel_format is None:
                pixel_format, band_indices = choose_pixel_format(source.path, info, options)
                if expression is not None:
                    expression.band_indices(pixel_format.bands)
            else:
                band_indices = match_pixel_format(source.path, info, pixel_format, options)
            rule = choose_mask(raster, expression, options.mask_files)
        images.append(Image(source, tuple(band_indices), rule, info.height, info.width))
    assert pixel_format is not None
    return ImageSet(tuple(images), pixel_format, options)


class MaskedImage:
    """An open image with its leaf mask. Use as a context manager."""

    def __init__(
        self,
        source: ImageSource,
        band_indices: tuple[int, ...],
        rule: MaskRule,
        pixel_format: PixelFormat,
        options: ReadOptions,
    ) -> None:
        self._band_indices = band_indices
        self._rule = rule
        self._pixel_format = pixel_format
        self._num_leaf_values = self._num_bright_values = 0
        self._counts_bright_values = options.scale is None and np.dtype(pixel_format.source_dtype).kind == "f"
        self._bands = rule.expression.band_indices(pixel_format.bands) if rule.expression else {}
        with ExitStack() as stack:
            self.raster = stack.enter_context(Raster(source, options))
            self._mask_file = stack.enter_context(MaskFile(rule.file, self.raster)) if rule.file else None
            self._open_files = stack.pop_all()

    def __enter__(self) -> MaskedImage:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._open_files.close()

    def read(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return stored values (C, H, W) and leaf mask (H, W) of a window. Values that are not finite become 0.

        Raises: ValueError if a file is damaged.
        """
        stored_CHW, valid_HW = self._read_stored(row, col, height, width)
        if self._rule.bits is not None:
            leaf_HW = self._rule.bits.read(row, col, height, width)
        else:
            leaf_HW = valid_HW & self._apply_rule(stored_CHW, row, col)
        self._count_bright_values(stored_CHW, leaf_HW)
        return stored_CHW, leaf_HW

    def read_leaf(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        """Return the leaf mask (H, W) of a window.

        The bands are read as well, so that damaged files are found early, unless an earlier pass has read them.

        Raises: ValueError if a file is damaged.
        """
        if self._rule.bits is None or self._counts_bright_values:
            return self.read(row, col, height, width)[1]
        return self._rule.bits.read(row, col, height, width)

    def check_reflectance(self) -> None:
        """Check the values of a float raster that were read so far.

        Raises: ValueError if most leaf values are too bright for reflectance.
        """
        if 2 * self._num_bright_values > self._num_leaf_values:
            raise too_bright(self.raster.source.path)

    def quantity_windows(self) -> Iterator[NDArray[np.float64]]:
        """Yield the quantity whose threshold `otsu()` finds, at the valid pixels (P,) of one window after another."""
        assert self._rule.expression is not None
        for row, height in self._window_rows():
            for col, width in self._window_columns():
                stored_CHW, valid_HW = self._read_stored(row, col, height, width)
                quantity_HW = self._rule.expression.quantity(self._reflectance(stored_CHW))
                yield quantity_HW[valid_HW & np.isfinite(quantity_HW)]

    def leaf_strips(self) -> Iterator[NDArray[np.bool_]]:
        """Iterate over the leaf mask of the image in full-width strips, from top to bottom."""
        for row, height in self._window_rows():
            pieces = []
            for col, width in self._window_columns():
                stored_CHW, valid_HW = self._read_stored(row, col, height, width)
                pieces.append(valid_HW & self._apply_rule(stored_CHW, row, col))
            yield np.concatenate(pieces, axis=1)

    def _window_rows(self) -> Iterator[tuple[int, int]]:
        height = self.raster.info.height
        return ((row, min(WINDOW_ROWS, height - row)) for row in range(0, height, WINDOW_ROWS))

    def _window_columns(self) -> Iterator[tuple[int, int]]:
        step, width = max(64, WINDOW_BYTES // (8 * WINDOW_ROWS * len(self._band_indices))), self.raster.info.width
        return ((col, min(step, width - col)) for col in range(0, width, step))

    def _read_stored(self, row: int, col: int, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        values_CHW, valid_HW = self.raster.read(self._band_indices, row, col, height, width)
        stored_CHW = self._pixel_format.store(values_CHW)
        if stored_CHW.dtype.kind == "f":
            finite_CHW = np.isfinite(stored_CHW)
            valid_HW &= finite_CHW.all(axis=0)
            stored_CHW[~finite_CHW] = 0
        return stored_CHW, valid_HW

    def _apply_rule(self, stored_CHW: NDArray[Any], row: int, col: int) -> Any:
        """Return the leaf mask (H, W) of the rule alone, or True for all pixels. It still contains invalid pixels."""
        if self._mask_file is not None:
            return self._mask_file.read(row, col, *stored_CHW.shape[1:])
        if (expression := self._rule.expression) is not None:
            return expression.leaf(self._reflectance(stored_CHW), self._rule.threshold)
        return True

    def _reflectance(self, stored_CHW: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
        values = self._pixel_format.reflectance(stored_CHW, list(self._bands.values()))
        return dict(zip(self._bands, values, strict=True))

    def _count_bright_values(self, stored_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> None:
        if self._counts_bright_values:
            reflectance_CP = self._pixel_format.reflectance(stored_CHW[:, leaf_HW])
            self._num_leaf_values += reflectance_CP.size
            self._num_bright_values += int(np.count_nonzero(reflectance_CP > BRIGHT))
