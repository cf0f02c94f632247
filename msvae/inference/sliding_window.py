"""Sliding-window reconstruction of one image: overlapping windows go through the model and are blended into rows.

C bands, H rows, W columns. A window is a part of the image that the model encodes and decodes at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.inference.load import explain_out_of_memory
from msvae.inference.raster_output import BLOCK_PX
from msvae.messages import counted
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.rasters.images import MaskedImage
from msvae.rasters.pixel_format import PixelFormat

MOSAIC_BYTES = 2**27
"""Memory for blended rows. A wider raster is reconstructed in several swaths of columns, from top to bottom each."""


@dataclass(frozen=True)
class AxisWindows:
    """Windows of equal size along one axis of a raster. The last may reach beyond the raster by less than a cell."""

    length_px: int
    """Length of the raster."""
    tile_px: int
    """Maximum side of a window."""
    overlap_px: int
    """Minimum overlap of neighbours. A quarter of it at either end is context and is discarded, because a window does
    not contain the whole neighbourhood of pixels near its border."""
    cell_px: int = 8
    """Side of a latent cell. Windows start at multiples of it, so that all windows have the same cells."""

    @property
    def window_px(self) -> int:
        """Side of a window: `tile_px`, or less if the raster is smaller."""
        return min(self.tile_px, self._covered_px)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First pixel of every window, evenly spaced."""
        beyond = self._covered_px - self.window_px
        steps = math.ceil(beyond / (self.tile_px - self.overlap_px))
        return (*(round(i * beyond / steps / self.cell_px) * self.cell_px for i in range(steps)), beyond)

    @property
    def _covered_px(self) -> int:
        return -(-self.length_px // self.cell_px) * self.cell_px

    def weights(self, window: int) -> NDArray[np.float32]:
        """Return the blending weight of a window at each of its pixels, (window_px,).

        The weights of all windows add up to 1 at each pixel.
        """
        start = self.starts[window]
        total = sum(
            self._unnormalised_weights(other, start)
            for other in range(len(self.starts))
            if abs(self.starts[other] - start) < self.window_px
        )
        weights: NDArray[np.float32] = (self._unnormalised_weights(window, start) / total).astype(np.float32)
        return weights

    def touching(self, begin: int, end: int) -> Iterator[int]:
        """Yield the windows that have a positive weight between two pixels."""
        for window, start in enumerate(self.starts):
            visible = np.flatnonzero(self._unnormalised_weights(window, start)) + start
            if visible[0] < end and begin <= visible[-1]:
                yield window

    def complete_before(self, window: int) -> int:
        """Return the first pixel that a later window can change, or the length of the raster."""
        if window + 1 == len(self.starts):
            return self.length_px
        return self.starts[window + 1]

    def _unnormalised_weights(self, window: int, origin: int) -> NDArray[np.float64]:
        """Return the weights of a window at the `window_px` pixels from `origin`.

        They are 1 inside, follow a raised cosine over each overlap, and are 0 in the context and outside.
        """
        pixel: NDArray[np.float64] = np.arange(self.window_px, dtype=np.float64) + 0.5 + origin
        start, end = self.starts[window], self.starts[window] + self.window_px
        inside: NDArray[np.float64] = ((start < pixel) & (pixel < end)).astype(np.float64)
        if window > 0:
            inside *= _raised_cosine(pixel, start, self.starts[window - 1] + self.window_px, self.overlap_px)
        if window + 1 < len(self.starts):
            inside *= 1 - _raised_cosine(pixel, self.starts[window + 1], end, self.overlap_px)
        return inside


def _raised_cosine(pixel: NDArray[np.float64], begin: int, end: int, overlap_px: int) -> NDArray[np.float64]:
    """Return a ramp from 0 to 1 over the overlap from `begin` to `end`, without the context at both ends."""
    context_px = overlap_px / 4
    share = np.clip((pixel - begin - context_px) / (end - begin - 2 * context_px), 0, 1)
    ramp: NDArray[np.float64] = (1 - np.cos(np.pi * share)) / 2
    return ramp


class Mosaic:
    """Blended windows of some columns of a raster. Only rows that are not complete are in memory.

    Windows are added from top to bottom, and complete rows are taken from the top.
    """

    def __init__(self, num_bands: int, down: AxisWindows, across: AxisWindows, cols: range) -> None:
        self._down, self._across, self._cols = down, across, cols
        self._blended_CHW = np.zeros((num_bands, 0, len(cols)), np.float32)
        self._first_row = 0

    def add(self, window_row: int, window_col: int, tile_CHW: NDArray[np.float32]) -> None:
        """Add one window. It must not start in rows that `take` has already removed."""
        row = self._down.starts[window_row] - self._first_row
        self._extend(row + tile_CHW.shape[1])
        left = self._across.starts[window_col] - self._cols.start
        # a window may reach beyond the columns on either side
        inside = slice(max(0, -left), min(tile_CHW.shape[2], len(self._cols) - left))
        weights_HW = np.outer(self._down.weights(window_row), self._across.weights(window_col)[inside])
        target = self._blended_CHW[:, row : row + tile_CHW.shape[1], left + inside.start : left + inside.stop]
        target += tile_CHW[..., inside] * weights_HW

    def take(self, end_row: int) -> tuple[int, NDArray[np.float32]]:
        """Remove and return the rows before `end_row`: the index of the first row, and values (C, rows, columns)."""
        first, num_rows = self._first_row, end_row - self._first_row
        self._extend(num_rows)
        # copies, so that the memory of the whole array is freed
        rows_CHW, self._blended_CHW = (part.copy() for part in np.split(self._blended_CHW, [num_rows], axis=1))
        self._first_row = end_row
        return first, rows_CHW

    def _extend(self, num_rows: int) -> None:
        bands, height, width = self._blended_CHW.shape
        if num_rows > height:
            added = np.zeros((bands, num_rows - height, width), np.float32)
            self._blended_CHW = np.concatenate([self._blended_CHW, added], axis=1)


@dataclass(frozen=True)
class _Window:
    """Input of the model for one window of the mosaic."""

    row: int
    col: int
    reflectance: Tensor
    """(C, H, W)."""
    leaf_mask: Tensor
    """(H, W)."""


class SlidingWindow:
    """Reconstructs an image of `height` x `width` px in windows of at most `tile_px`, `batch_size` windows at once."""

    def __init__(
        self,
        model: AutoencoderKLMultispectralAdapter,
        height: int,
        width: int,
        tile_px: int,
        overlap_px: int,
        batch_size: int,
    ) -> None:
        self._model, self._batch_size = model, batch_size
        self._down = AxisWindows(height, tile_px, overlap_px, model.downscale)
        self._across = AxisWindows(width, tile_px, overlap_px, model.downscale)
        rows_bytes = 4 * len(model.bands) * 2 * tile_px
        self._swath_px = max(MOSAIC_BYTES // rows_bytes // BLOCK_PX, 1) * BLOCK_PX

    def swaths(self) -> Iterator[range]:
        """Yield ranges of columns to reconstruct one after the other. They start at multiples of `BLOCK_PX`."""
        width = self._across.length_px
        return (range(col, min(col + self._swath_px, width)) for col in range(0, width, self._swath_px))

    @property
    def num_windows(self) -> int:
        """Number of windows in all swaths, with or without leaf."""
        return len(self._down.starts) * sum(len(self._columns(cols)) for cols in self.swaths())

    def rows(
        self, image: MaskedImage, pixel_format: PixelFormat, cols: range, count_windows: Callable[[int], None]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield complete rows of a swath from top to bottom: index of the first row, reflectance (C, rows, columns).

        Pixels that are in no window with leaf are 0.

        Args:
            image: open image.
            pixel_format: pixel format of its values.
            cols: columns of the swath.
            count_windows: called with the number of windows that are finished since the last call.
        Raises: ValueError if a file is damaged or holds no reflectance, or if the memory of the device is too small.
        """
        mosaic = Mosaic(len(pixel_format.bands), self._down, self._across, cols)
        for window_row in range(len(self._down.starts)):
            with_leaf = self._windows_with_leaf(image, pixel_format, window_row, cols, count_windows)
            while batch := list(islice(with_leaf, self._batch_size)):
                for window, recon_CHW in zip(batch, self._reconstruct(batch), strict=True):
                    mosaic.add(window.row, window.col, recon_CHW)
            image.check_reflectance()
            yield mosaic.take(self._down.complete_before(window_row))

    def _columns(self, cols: range) -> list[int]:
        return list(self._across.touching(cols.start, cols.stop))

    def _windows_with_leaf(
        self,
        image: MaskedImage,
        pixel_format: PixelFormat,
        window_row: int,
        cols: range,
        count_windows: Callable[[int], None],
    ) -> Iterator[_Window]:
        for window_col in self._columns(cols):
            window = self._read(image, pixel_format, window_row, window_col)
            if window.leaf_mask.any():
                yield window
            count_windows(1)

    def _read(self, image: MaskedImage, pixel_format: PixelFormat, window_row: int, window_col: int) -> _Window:
        row, col = self._down.starts[window_row], self._across.starts[window_col]
        height = min(self._down.window_px, self._down.length_px - row)
        width = min(self._across.window_px, self._across.length_px - col)
        stored_CHW, leaf_HW = image.read(row, col, height, width)
        # pixels beyond the raster are NaN and not leaf, so that the model fills them
        shape = (self._down.window_px, self._across.window_px)
        reflectance_CHW = torch.full((len(stored_CHW), *shape), torch.nan)
        reflectance_CHW[:, :height, :width] = torch.from_numpy(pixel_format.reflectance(stored_CHW))
        padded_HW = torch.zeros(shape, dtype=torch.bool)
        padded_HW[:height, :width] = torch.from_numpy(leaf_HW)
        return _Window(window_row, window_col, reflectance_CHW, padded_HW)

    @torch.inference_mode()
    def _reconstruct(self, windows: list[_Window]) -> NDArray[np.float32]:
        device = self._model.device
        reflectance_BCHW = torch.stack([window.reflectance for window in windows]).to(device)
        leaf_B1HW = torch.stack([window.leaf_mask for window in windows])[:, None].to(device)
        with explain_out_of_memory(counted(len(windows), "window"), leaf_B1HW, "--batch-size or --tile"):
            latents = self._model.encode(reflectance_BCHW, mask=leaf_B1HW).latent_dist.mode()
            recon: NDArray[np.float32] = self._model.decode(latents, return_dict=False)[0].float().cpu().numpy()
        return recon
