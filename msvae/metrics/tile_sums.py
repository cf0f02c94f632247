"""Sums over the leaf pixels of each tile, in float64 and reflectance: squared error, angle, indices and SSIM.

`latent_sums` returns sums over latent cells. Dimensions: B tiles of a batch, C bands, H, W pixels; K latent channels,
h, w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from skimage.metrics import structural_similarity
from torch import Tensor

from msvae.bands import MIN_INDEX_SUM, NORMALISED_DIFFERENCES, Bands

MIN_NORM = 1e-6
"""Norm of the shortest spectrum that has a direction, in reflectance."""
MIN_RED_EDGE = 0.01
"""Smallest divisor of CIre. Leaves reflect far more in the red edge, and a smaller divisor causes a huge ratio."""
SSIM_WINDOW_PX = 7


@dataclass(frozen=True)
class LeafPixels:
    """Leaf pixels of a batch and of its reconstruction."""

    recon: Tensor
    """Reconstruction (B, C, H, W), float64 reflectance, 0 where `leaf` is False."""
    target: Tensor
    """Original (B, C, H, W), float64 reflectance, 0 where `leaf` is False."""
    leaf: Tensor
    """Leaf pixels whose original is finite in every band, (B, H, W) bool."""

    @classmethod
    def from_tensors(cls, recon_BCHW: Tensor, target_BCHW: Tensor, leaf_mask_B1HW: Tensor) -> LeafPixels:
        """Select the leaf pixels whose original is finite in every band. No other pixel affects any result."""
        leaf = leaf_mask_B1HW.any(dim=1) & target_BCHW.isfinite().all(dim=1)
        recon, target = (torch.where(leaf[:, None], x.double(), 0.0) for x in (recon_BCHW, target_BCHW))
        return cls(recon, target, leaf)

    @cached_property
    def has_angle(self) -> Tensor:
        """Leaf pixels whose original spectrum has a direction, (B, H, W) bool."""
        long_enough: Tensor = self.target.norm(dim=1) > MIN_NORM
        return self.leaf & long_enough

    @cached_property
    def angle_deg(self) -> Tensor:
        """Spectral angle, (B, H, W), 0 where `has_angle` is False."""
        return torch.where(self.has_angle, torch.rad2deg(angle_rad(self.recon, self.target)), 0.0)

    @cached_property
    def error(self) -> Tensor:
        """Reconstruction minus original, (B, C, H, W)."""
        return self.recon - self.target

    @cached_property
    def brightness(self) -> Tensor:
        """Mean reflectance of the original over the bands, (B, H, W)."""
        return self.target.mean(dim=1)


def angle_rad(u_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """Return the angle between spectra along dim 1, (B, H, W), by atan2 (Kahan 2006); pi / 2 to a zero spectrum."""
    u = u_BCHW / u_BCHW.norm(dim=1, keepdim=True).clamp(min=1e-12)
    v = v_BCHW / v_BCHW.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))


def spectral_sums(pixels: LeafPixels, bands: Bands) -> dict[str, Tensor]:
    """Return the sums of each tile that every evaluation needs, float64.

    Returns: `num_pixels` (B,); `squared_error` (B, C); `angle_deg` (B,) and the number of summed angles, `num_angles`
        (B,); and `index_sums` of the normalised differences that can be computed from the bands.
    """
    return {
        "num_pixels": pixels.leaf.sum(dim=(1, 2)).double(),
        "squared_error": pixels.error.square().sum(dim=(2, 3)),
        "angle_deg": pixels.angle_deg.sum(dim=(1, 2)),
        "num_angles": pixels.has_angle.sum(dim=(1, 2)).double(),
        **index_sums(pixels, bands, NORMALISED_DIFFERENCES),
    }


class Index(NamedTuple):
    """A vegetation index of two bands."""

    first: str
    """Role of the first band."""
    second: str
    """Role of the second band."""
    compute: Callable[[Tensor, Tensor], Tensor]
    """Function from the reflectance of the two bands to the index."""


def normalised_difference(first: Tensor, second: Tensor) -> Tensor:
    """Return (a - b) / (a + b), a number from -1 to 1. Negative reflectance counts as 0."""
    a, b = first.clamp(min=0), second.clamp(min=0)
    return (a - b) / (a + b).clamp(min=MIN_INDEX_SUM)


def chlorophyll_index(first: Tensor, second: Tensor) -> Tensor:
    """Return a / b - 1, the red-edge chlorophyll index (Gitelson, Gritz, Merzlyak 2003)."""
    return first.clamp(min=0) / second.clamp(min=MIN_RED_EDGE) - 1


INDICES = {
    "ndvi": Index("nir", "red", normalised_difference),
    "ndre": Index("nir", "red_edge", normalised_difference),
    "gndvi": Index("nir", "green", normalised_difference),
    "cire": Index("nir", "red_edge", chlorophyll_index),
}


def index_sums(pixels: LeafPixels, bands: Bands, names: Iterable[str]) -> dict[str, Tensor]:
    """Return error sums of each tile for the named indices that can be computed from the bands.

    Returns: per index `NAME_error` (B,), the absolute error, and `NAME_signed_error` (B,), reconstruction minus
        original.
    """
    sums = {}
    for name in names:
        index = INDICES[name]
        if bands.has(index.first, index.second):
            pair = bands.index(index.first), bands.index(index.second)
            recon, target = (index.compute(*(x[:, band] for band in pair)) for x in (pixels.recon, pixels.target))
            # outside the leaf both sides are equal, because both reflectances are 0 there
            sums[f"{name}_error"] = (recon - target).abs().sum(dim=(1, 2))
            sums[f"{name}_signed_error"] = (recon - target).sum(dim=(1, 2))
    return sums


def ssim_sums(pixels: LeafPixels, data_range: Sequence[float]) -> dict[str, Tensor]:
    """Return the structural similarity of each tile, summed over the windows that are fully inside the leaf.

    SSIM of Wang et al. 2004 with 7 x 7 windows, computed by scikit-image.

    Args: `data_range` (C,) is the span of each band over training leaves, in reflectance. With a span of 1 the SSIM of
        dark bands would always be near 1.
    Returns: `ssim` (B, C) and the number of windows, `num_ssim` (B,).
    """
    # the background is 0 here: scikit-image uses running sums over rows, which would carry large values into the leaf
    recon, target, leaf = (x.detach().cpu().numpy() for x in (pixels.recon, pixels.target, pixels.leaf))
    tiles = zip(recon, target, leaf, strict=True)
    totals, counts = zip(*(_ssim_sum_of_tile(*tile, data_range) for tile in tiles), strict=True)
    return {
        "ssim": torch.tensor(np.stack(totals), dtype=torch.float64),
        "num_ssim": torch.tensor(counts, dtype=torch.float64),
    }


def latent_sums(mean_BKhw: Tensor, logvar_BKhw: Tensor, leaf_share_Bhw: Tensor) -> dict[str, Tensor]:
    """Return sums over the latent cells of each tile, float64, weighted by leaf share.

    Returns: `cells` (B,), the sum of leaf shares; and (B, K) `latent` and `latent_squared` (of the posterior mean),
        `posterior_std`, and `kl` (nats, against N(0, 1)).
    """
    share = leaf_share_Bhw[:, None].double()
    mean, logvar = mean_BKhw.double(), logvar_BKhw.double()
    maps = {
        "latent": mean,
        "latent_squared": mean.square(),
        "posterior_std": (logvar / 2).exp(),
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar),
    }
    # a cell without leaf may hold NaN or infinity
    sums = {name: torch.where(share > 0, values * share, 0.0).sum(dim=(2, 3)) for name, values in maps.items()}
    return {"cells": share.sum(dim=(1, 2, 3)), **sums}


def _ssim_sum_of_tile(
    recon_CHW: NDArray[np.float64], target_CHW: NDArray[np.float64], leaf_HW: NDArray[np.bool_], span: Sequence[float]
) -> tuple[NDArray[np.float64], int]:
    totals_C = np.zeros(len(span))
    inside = binary_erosion(leaf_HW, np.ones((SSIM_WINDOW_PX, SSIM_WINDOW_PX)), border_value=0)
    if inside.any():
        for band, data_range in enumerate(span):
            _, ssim = structural_similarity(
                recon_CHW[band], target_CHW[band], win_size=SSIM_WINDOW_PX, data_range=data_range, full=True
            )
            totals_C[band] = ssim[inside].sum()
    return totals_C, int(inside.sum())
