"""Structural similarity of leaf pixels: windows that lie inside the leaf, band by band."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from skimage.metrics import structural_similarity
from torch import Tensor

WINDOW_PX = 7


def ssim_sums(
    recon_BCHW: Tensor, target_BCHW: Tensor, leaf_mask_B1HW: Tensor, data_range: Sequence[float]
) -> dict[str, Tensor]:
    """Sum of SSIM over windows fully inside the leaf and all bands, and their number; (B,) float64 each.

    SSIM of Wang et al. 2004 with 7 x 7 windows, as scikit-image computes it. `data_range` (C,) is the span of
    each band over training leaves, in reflectance: with a span of 1, dark bands would always look alike.
    """
    leaf = leaf_mask_B1HW & target_BCHW.isfinite().all(dim=1, keepdim=True)
    # running sums over whole rows would carry large background values into the leaf's windows
    recon, target = (torch.where(leaf, x.detach().double(), 0.0).cpu().numpy() for x in (recon_BCHW, target_BCHW))
    pairs = zip(recon, target, leaf[:, 0].cpu().numpy(), strict=True)
    totals, counts = zip(*(_tile(recon, target, leaf, data_range) for recon, target, leaf in pairs), strict=True)
    return {"ssim": torch.tensor(totals, dtype=torch.float64), "num_ssim": torch.tensor(counts, dtype=torch.float64)}


def _tile(
    recon_CHW: NDArray[np.float64], target_CHW: NDArray[np.float64], leaf_HW: NDArray[np.bool_], span: Sequence[float]
) -> tuple[float, int]:
    inside = binary_erosion(leaf_HW, np.ones((WINDOW_PX, WINDOW_PX)), border_value=0)
    if not inside.any():
        return 0.0, 0
    total = 0.0
    for recon, target, data_range in zip(recon_CHW, target_CHW, span, strict=True):
        _, ssim = structural_similarity(recon, target, win_size=WINDOW_PX, data_range=data_range, full=True)
        total += float(ssim[inside].sum())
    return total, int(inside.sum()) * len(span)
