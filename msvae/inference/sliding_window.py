"""The windows of one image through a model, blended into complete rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.inference.load import fitting_into_memory
from msvae.inference.mosaic import Mosaic
from msvae.inference.raster_output import BLOCK_PX
from msvae.inference.windows import WindowsAlong
from msvae.messages import counted
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.rasters.layout import Layout
from msvae.rasters.masks import MaskedImage

MOSAIC_BYTES = 2**27
"""Wider rasters are made in several runs from top to bottom, which share a column of windows."""


@dataclass(frozen=True)
class Window:
    """Where a window lies in the mosaic, and what the model sees of it."""

    row: int
    col: int
    reflectance: Tensor
    """(C, H, W)"""
    leaf_mask: Tensor
    """(H, W)"""


class TiledModel:
    """A model that is shown an image of `height` x `width` px in windows of at most `tile_px`."""

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
        self._down = WindowsAlong(height, tile_px, overlap_px, model.downscale)
        self._across = WindowsAlong(width, tile_px, overlap_px, model.downscale)
        rows_bytes = 4 * len(model.bands) * 2 * tile_px
        self._swath_px = max(MOSAIC_BYTES // rows_bytes // BLOCK_PX, 1) * BLOCK_PX

    def swaths(self) -> Iterator[range]:
        """Columns that are made at once. They begin at multiples of the blocks of a file."""
        width = self._across.length_px
        return (range(col, min(col + self._swath_px, width)) for col in range(0, width, self._swath_px))

    @property
    def num_windows(self) -> int:
        """In all swaths, with or without leaf."""
        return len(self._down.starts) * sum(len(self._columns(cols)) for cols in self.swaths())

    def rows(
        self, image: MaskedImage, layout: Layout, cols: range, count: Callable[[int], None]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """First row and reflectance (C, rows, columns) of what is complete, from top to bottom; 0 off all windows with
        leaf.

        Raises: ValueError when a file is damaged, holds no reflectance, or the memory of a GPU is too small.
        """
        mosaic = Mosaic(len(layout.bands), self._down, self._across, cols)
        for window_row in range(len(self._down.starts)):
            with_leaf = self._with_leaf(image, layout, window_row, cols, count)
            while batch := list(islice(with_leaf, self._batch_size)):
                for window, recon_CHW in zip(batch, self._reconstruct(batch), strict=True):
                    mosaic.add(window.row, window.col, recon_CHW)
            image.check_reflectance()
            yield mosaic.take(self._down.complete_before(window_row))

    def _columns(self, cols: range) -> list[int]:
        return list(self._across.touching(cols.start, cols.stop))

    def _with_leaf(
        self, image: MaskedImage, layout: Layout, window_row: int, cols: range, count: Callable[[int], None]
    ) -> Iterator[Window]:
        for window_col in self._columns(cols):
            window = self._read(image, layout, window_row, window_col)
            if window.leaf_mask.any():
                yield window
            count(1)

    def _read(self, image: MaskedImage, layout: Layout, window_row: int, window_col: int) -> Window:
        row, col = self._down.starts[window_row], self._across.starts[window_col]
        height = min(self._down.window_px, self._down.length_px - row)
        width = min(self._across.window_px, self._across.length_px - col)
        stored_CHW, leaf_HW = image.read(row, col, height, width)
        # what lies beyond the raster is not finite, so that the model fills it, and no leaf
        shape = (self._down.window_px, self._across.window_px)
        reflectance_CHW = torch.full((len(stored_CHW), *shape), torch.nan)
        reflectance_CHW[:, :height, :width] = torch.from_numpy(layout.reflectance(stored_CHW))
        padded_HW = torch.zeros(shape, dtype=torch.bool)
        padded_HW[:height, :width] = torch.from_numpy(leaf_HW)
        return Window(window_row, window_col, reflectance_CHW, padded_HW)

    @torch.inference_mode()
    def _reconstruct(self, windows: list[Window]) -> NDArray[np.float32]:
        device = self._model.device
        reflectance_BCHW = torch.stack([window.reflectance for window in windows]).to(device)
        leaf_B1HW = torch.stack([window.leaf_mask for window in windows])[:, None].to(device)
        with fitting_into_memory(counted(len(windows), "window"), leaf_B1HW, "--batch-size or --tile"):
            latents = self._model.encode(reflectance_BCHW, mask=leaf_B1HW).latent_dist.mode()
            recon: NDArray[np.float32] = self._model.decode(latents, return_dict=False)[0].float().cpu().numpy()
        return recon
