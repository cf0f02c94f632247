"""How far reconstructed leaf spectra are from the originals: sums for each tile, in float64 and reflectance."""

from __future__ import annotations

import torch
from torch import Tensor

from msvae.bands import MIN_INDEX_SUM, Bands


def spectral_sums(recon_BCHW: Tensor, target_BCHW: Tensor, leaf_mask_B1HW: Tensor, bands: Bands) -> dict[str, Tensor]:
    """Sums over the finite leaf pixels of each tile, (B,) float64 each.

    `num_pixels`; `squared_error/i` of band i; `angle_deg` and its `num_angles` (zero spectra have none);
    absolute errors of the normalised differences that the bands allow.
    """
    leaf = leaf_mask_B1HW.any(dim=1) & target_BCHW.isfinite().all(dim=1)
    recon = torch.where(leaf[:, None], recon_BCHW.double(), 0.0)
    target = torch.where(leaf[:, None], target_BCHW.double(), 0.0)
    sums = {"num_pixels": leaf.sum(dim=(1, 2)).double()}
    squared_error = (recon - target).square().sum(dim=(2, 3))
    sums |= {f"squared_error/{i}": squared_error[:, i] for i in range(len(bands))}
    has_angle = leaf & (target.norm(dim=1) > 1e-6)
    angle_deg = torch.where(has_angle, torch.rad2deg(angle_rad(recon, target)), 0.0)
    sums["angle_deg"] = angle_deg.sum(dim=(1, 2))
    sums["num_angles"] = has_angle.sum(dim=(1, 2)).double()
    for index, pair in bands.index_pairs().items():
        error = normalised_difference(recon, *pair) - normalised_difference(target, *pair)
        sums[f"{index}_error"] = error.abs().sum(dim=(1, 2))
    return sums


def angle_rad(u_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """Angle between spectra along dim 1, (B, H, W), by atan2 (Kahan 2006); pi / 2 to a zero spectrum."""
    u = u_BCHW / u_BCHW.norm(dim=1, keepdim=True).clamp(min=1e-12)
    v = v_BCHW / v_BCHW.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))


def normalised_difference(reflectance_BCHW: Tensor, first: int, second: int) -> Tensor:
    """(a - b) / (a + b), (B, H, W), of reflectance that is not negative; within -1..1."""
    a, b = reflectance_BCHW[:, first].clamp(min=0), reflectance_BCHW[:, second].clamp(min=0)
    return (a - b) / (a + b).clamp(min=MIN_INDEX_SUM)
