"""Counts in fixed bins: spectral angles, errors and brightness. Integer counts add up exactly over tiles and ranks."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.metrics.tile_sums import LeafPixels

SMALLEST_ANGLE_DEG = 1e-3
ANGLE_STEP = 1.01
"""Upper edge of an angle bin divided by its lower edge. Percentiles above 0.001 degrees are exact to 1 %."""
NUM_ANGLE_BINS = 1 + math.ceil(math.log(180 / SMALLEST_ANGLE_DEG) / math.log(ANGLE_STEP))
"""Number of angle bins. The first bin holds all angles below 0.001 degrees."""
ANGLE_EDGES_DEG = np.concatenate([[0.0], SMALLEST_ANGLE_DEG * ANGLE_STEP ** np.arange(NUM_ANGLE_BINS)])

ERROR_EDGES = np.linspace(-0.2, 0.2, 401)
"""Edges of the error bins, in reflectance. Larger errors count in the first and the last bin."""

NUM_DECILES = 10
BRIGHTNESS_BIN_WIDTH = 1e-4
"""Width of a brightness bin, in reflectance. The first bin starts at 0."""
NUM_BRIGHTNESS_BINS = 20_000
"""Number of brightness bins. Values outside all bins count in the first or the last bin."""


def angle_counts(pixels: LeafPixels) -> Tensor:
    """Count the spectral angles of each tile, (B, bins) int64."""
    steps = (pixels.angle_deg.clamp(min=1e-30) / SMALLEST_ANGLE_DEG).log() / math.log(ANGLE_STEP)
    bins = (steps.floor() + 1).clamp(0, NUM_ANGLE_BINS - 1).long()
    tiles = zip(bins, pixels.has_angle, strict=True)
    return torch.stack([torch.bincount(tile[chosen], minlength=NUM_ANGLE_BINS) for tile, chosen in tiles])


def error_counts(pixels: LeafPixels) -> Tensor:
    """Count the errors of each band over all tiles of the batch, (C, bins) int64."""
    width, num_bins = ERROR_EDGES[1] - ERROR_EDGES[0], len(ERROR_EDGES) - 1
    bins = ((pixels.error - ERROR_EDGES[0]) / width).floor().clamp(0, num_bins - 1).long()
    return torch.stack([torch.bincount(band[pixels.leaf], minlength=num_bins) for band in bins.unbind(dim=1)])


def brightness_counts(brightness_BHW: Tensor, leaf_BHW: Tensor) -> Tensor:
    """Count the leaf pixels of the batch by brightness, (20,000,) int64."""
    return torch.bincount(_brightness_bins(brightness_BHW)[leaf_BHW], minlength=NUM_BRIGHTNESS_BINS)


def quantile(counts: NDArray[np.float64], edges: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Return the value below which `share` of the counted values are, interpolated linearly within its bin.

    Args: counts (…, bins); edges (bins + 1,).
    Returns: (…), NaN where nothing was counted.
    """
    below = np.cumsum(counts, axis=-1)
    rank = share * below[..., -1:]
    bins = np.minimum((below < rank).sum(axis=-1), counts.shape[-1] - 1)
    inside = np.take_along_axis(counts, bins[..., None], -1)[..., 0]
    before = np.take_along_axis(below, bins[..., None], -1)[..., 0] - inside
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (rank[..., 0] - before) / inside
    values: NDArray[np.float64] = edges[bins] + part * (edges[bins + 1] - edges[bins])
    return np.where(below[..., -1] > 0, values, np.nan)


class BrightnessDeciles:
    """Ten groups of the leaf pixels of a split, from dark to bright.

    A bin is never divided, so the groups have only approximately the same size.

    Args: counts of `brightness_counts`, added over all tiles.
    """

    edges: list[float]
    """The nine brightness values between the deciles, in reflectance."""

    def __init__(self, counts: NDArray[np.int64]) -> None:
        # the rank of the middle pixel of a bin decides to which decile the whole bin belongs
        middle = np.cumsum(counts) - counts / 2
        decile_of_bin = (middle * NUM_DECILES / max(1, counts.sum())).astype(np.int64).clip(0, NUM_DECILES - 1)
        self.edges = (np.searchsorted(decile_of_bin, np.arange(1, NUM_DECILES)) * BRIGHTNESS_BIN_WIDTH).tolist()
        self._decile_of_bin = torch.from_numpy(decile_of_bin)

    def __call__(self, brightness_BHW: Tensor) -> Tensor:
        """Return the decile of each pixel, (B, H, W) int64 from 0 to 9, for a brightness in reflectance."""
        return self._decile_of_bin.to(brightness_BHW.device)[_brightness_bins(brightness_BHW)]


def _brightness_bins(brightness_BHW: Tensor) -> Tensor:
    return (brightness_BHW / BRIGHTNESS_BIN_WIDTH).floor().long().clamp(0, NUM_BRIGHTNESS_BINS - 1)
