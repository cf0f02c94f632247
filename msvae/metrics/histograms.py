"""Counts in fixed bins: of spectral angles, for their percentiles, and of errors. Counts add up exactly over ranks."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.metrics.tile_sums import LeafPixels

SMALLEST_ANGLE_DEG = 1e-3
ANGLE_STEP = 1.01
"""Each bin of angles ends 1 % above its start: so exact are percentiles above 0.001 degrees."""
NUM_ANGLE_BINS = 1 + math.ceil(math.log(180 / SMALLEST_ANGLE_DEG) / math.log(ANGLE_STEP))
"""The first holds all below 0.001 degrees."""
ANGLE_EDGES_DEG = np.concatenate([[0.0], SMALLEST_ANGLE_DEG * ANGLE_STEP ** np.arange(NUM_ANGLE_BINS)])

ERROR_EDGES = np.linspace(-0.2, 0.2, 401)
"""In reflectance; larger errors count in the first and last bin."""


def angle_counts(pixels: LeafPixels) -> Tensor:
    """Of each tile its spectral angles by bin, (B, bins) int64."""
    steps = (pixels.angle_deg.clamp(min=1e-30) / SMALLEST_ANGLE_DEG).log() / math.log(ANGLE_STEP)
    bins = (steps.floor() + 1).clamp(0, NUM_ANGLE_BINS - 1).long()
    tiles = zip(bins, pixels.has_angle, strict=True)
    return torch.stack([torch.bincount(tile[chosen], minlength=NUM_ANGLE_BINS) for tile, chosen in tiles])


def error_counts(pixels: LeafPixels) -> Tensor:
    """Errors of each band by bin, (C, bins) int64, over all tiles."""
    width, num_bins = ERROR_EDGES[1] - ERROR_EDGES[0], len(ERROR_EDGES) - 1
    bins = ((pixels.error - ERROR_EDGES[0]) / width).floor().clamp(0, num_bins - 1).long()
    return torch.stack([torch.bincount(band[pixels.leaf], minlength=num_bins) for band in bins.unbind(dim=1)])


def quantile(counts: NDArray[np.float64], edges: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Below which `share` of what was counted, (…, bins), lies: (…), even inside a bin; NaN without counts."""
    below = np.cumsum(counts, axis=-1)
    rank = share * below[..., -1:]
    bins = np.minimum((below < rank).sum(axis=-1), counts.shape[-1] - 1)
    inside = np.take_along_axis(counts, bins[..., None], -1)[..., 0]
    before = np.take_along_axis(below, bins[..., None], -1)[..., 0] - inside
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (rank[..., 0] - before) / inside
    found: NDArray[np.float64] = edges[bins] + part * (edges[bins + 1] - edges[bins])
    return np.where(below[..., -1] > 0, found, np.nan)
