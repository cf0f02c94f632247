"""Deciles of brightness: leaf pixels in ten equal parts, from dark to bright, by a count over fine bins."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_DECILES = 10
BIN_WIDTH = 1e-4
"""In reflectance, from 0 on; what is darker or brighter than all bins counts in the first or last."""
NUM_BINS = 20_000


def brightness_counts(brightness_BHW: Tensor, leaf_BHW: Tensor) -> Tensor:
    """Leaf pixels in each bin, (20,000,) int64: counts add up exactly over tiles and ranks."""
    return torch.bincount(_bins(brightness_BHW)[leaf_BHW], minlength=NUM_BINS)


class DecileOf:
    """The decile, 0 to 9, of each pixel's brightness: bins up to a tenth of all counted pixels, up to two tenths, …

    A bin is never cut, so that parts are as equal as bins allow. `edges`: the nine reflectances between them.
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        # of a bin the rank of its middle pixel decides
        middle = np.cumsum(counts) - counts / 2
        decile_of_bin = (middle * NUM_DECILES / max(1, counts.sum())).astype(np.int64).clip(0, NUM_DECILES - 1)
        self.edges: list[float] = (np.searchsorted(decile_of_bin, np.arange(1, NUM_DECILES)) * BIN_WIDTH).tolist()
        self._decile_of_bin = torch.from_numpy(decile_of_bin)

    def __call__(self, brightness_BHW: Tensor) -> Tensor:
        """(B, H, W) int64 of brightness (B, H, W), reflectance."""
        return self._decile_of_bin.to(brightness_BHW.device)[_bins(brightness_BHW)]


def _bins(brightness_BHW: Tensor) -> Tensor:
    return (brightness_BHW / BIN_WIDTH).floor().long().clamp(0, NUM_BINS - 1)
