"""Which pixels count: checks of the leaf mask, the valid elements it leaves, and how much of a batch they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d


def check_mask(mask: Tensor | None, sample: Tensor) -> Tensor:
    """The mask as bool, (B, 1|C, H, W), on its own device; everything where it is None.

    Bool, integer or float masks are leaf above 0.5.
    Raises: ValueError for a wrong shape or device, or NaN in the mask.
    """
    if mask is None:
        return torch.ones_like(sample[:, :1], dtype=torch.bool)
    batch, channels, height, width = sample.shape
    if mask.shape not in ((batch, 1, height, width), (batch, channels, height, width)):
        raise ValueError(
            f"got a mask of shape {tuple(mask.shape)} for a sample of shape {tuple(sample.shape)}, expected "
            f"({batch}, 1, {height}, {width}) or one plane a band; reshape the mask"
        )
    if mask.device != sample.device:
        raise ValueError(f"got a mask on {mask.device} and a sample on {sample.device}; move both to one device")
    if mask.is_floating_point() and bool(mask.isnan().any()):
        raise ValueError("got a mask with NaN, expected 1 on leaf and 0 elsewhere; decide what those pixels are")
    return mask if mask.dtype == torch.bool else mask > 0.5


def valid_elements(original_BCHW: Tensor, leaf_mask: Tensor) -> Tensor:
    """Leaf elements with a finite value, (B, C, H, W) bool."""
    return leaf_mask & original_BCHW.isfinite()


def valid_spectra(original_BCHW: Tensor, valid_BCHW: Tensor, min_norm: float = 1e-6) -> Tensor:
    """Pixels whose every band is valid and whose spectrum is not zero, (B, H, W) bool: those that have an angle."""
    squared_norm = torch.where(valid_BCHW, original_BCHW.float(), 0.0).square().sum(dim=1)
    return valid_BCHW.all(dim=1) & (squared_norm > min_norm**2)


def latent_coverage(leaf_mask: Tensor, downscale: int) -> Tensor:
    """Leaf share of each latent cell, (B, H / downscale, W / downscale) float32."""
    return avg_pool2d(leaf_mask.any(dim=1, keepdim=True).float(), downscale).squeeze(1)


def mask_stats(leaf_mask: Tensor) -> dict[str, Tensor]:
    """Coverage statistics of a batch: `valid_pixels` and `total_pixels` add over ranks, `coverage` is their ratio."""
    leaf = leaf_mask.any(dim=1)
    valid_pixels = leaf.sum()
    total_pixels = torch.full_like(valid_pixels, leaf.numel())
    return {
        "coverage": valid_pixels / total_pixels,
        "valid_pixels": valid_pixels,
        "total_pixels": total_pixels,
    }
