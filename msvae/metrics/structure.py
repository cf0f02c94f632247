"""Structural similarity of leaf pixels: windows that lie inside the leaf, band by band."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from skimage.metrics import structural_similarity
from torch import Tensor

from msvae.metrics.tile_sums import LeafPixels

WINDOW_PX = 7


def ssim_sums(pixels: LeafPixels, data_range: Sequence[float]) -> dict[str, Tensor]:
    """Of each tile `ssim` (B, C), summed over the windows fully inside the leaf, and their number `num_ssim` (B,).

    SSIM of Wang et al. 2004 with 7 x 7 windows, as scikit-image computes it. `data_range` (C,) is the span of
    each band over training leaves, in reflectance: with a span of 1, dark bands would always look alike.
    """
    # background is 0: running sums over whole rows would carry large values of it into the leaf's windows
    recon, target, leaf = (x.detach().cpu().numpy() for x in (pixels.recon, pixels.target, pixels.leaf))
    totals, counts = zip(*(_tile(*tile, data_range) for tile in zip(recon, target, leaf, strict=True)), strict=True)
    return {
        "ssim": torch.tensor(np.stack(totals), dtype=torch.float64),
        "num_ssim": torch.tensor(counts, dtype=torch.float64),
    }


def _tile(
    recon_CHW: NDArray[np.float64], target_CHW: NDArray[np.float64], leaf_HW: NDArray[np.bool_], span: Sequence[float]
) -> tuple[NDArray[np.float64], int]:
    totals_C = np.zeros(len(span))
    inside = binary_erosion(leaf_HW, np.ones((WINDOW_PX, WINDOW_PX)), border_value=0)
    if inside.any():
        for band, data_range in enumerate(span):
            _, ssim = structural_similarity(
                recon_CHW[band], target_CHW[band], win_size=WINDOW_PX, data_range=data_range, full=True
            )
            totals_C[band] = ssim[inside].sum()
    return totals_C, int(inside.sum())
