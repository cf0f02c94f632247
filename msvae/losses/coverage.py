"""Leaf masks and coverage: check a mask, find valid elements, and count how much of a batch is leaf."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

NUM_BINS = 10
"""Number of bins of the coverage histogram."""


def check_mask(mask: Tensor | None, sample: Tensor) -> Tensor:
    """Return the leaf mask as bool, (B, 1|C, H, W); without a mask every pixel is leaf.

    A pixel of a bool, integer or float mask is leaf if it is above 0.5. A float mask is searched for NaN. This search
    waits for the device. Compiled code does not search; a pixel of NaN is then not leaf.

    Args: mask (B, 1|C, H, W) or None; sample (B, C, H, W) on the same device.
    Raises: ValueError if the shape, type or device is wrong, or if the mask contains NaN.
    """
    if sample.ndim != 4:
        raise ValueError(f"got a sample of shape {tuple(sample.shape)}, expected (B, C, H, W); add or drop dimensions")
    if not isinstance(mask, Tensor | None):
        raise ValueError(f"got a mask of type {type(mask).__name__}, expected a tensor; use torch.as_tensor")
    if mask is None:
        return torch.ones_like(sample[:, :1], dtype=torch.bool)
    batch, channels, height, width = sample.shape
    if mask.shape not in ((batch, 1, height, width), (batch, channels, height, width)):
        raise ValueError(
            f"got a mask of shape {tuple(mask.shape)} for a sample of shape {tuple(sample.shape)}, expected "
            f"({batch}, 1, {height}, {width}) or one plane per band; reshape the mask"
        )
    if mask.device != sample.device:
        raise ValueError(f"got a mask on {mask.device} and a sample on {sample.device}; move both to one device")
    if mask.is_floating_point() and not torch.compiler.is_compiling() and bool(mask.isnan().any()):
        raise ValueError("got a mask with NaN, expected 1 on leaf and 0 elsewhere; replace NaN by 0 or 1")
    return mask if mask.dtype == torch.bool else mask > 0.5


def valid_elements(original_BCHW: Tensor, leaf_mask: Tensor) -> Tensor:
    """Return which elements are leaf and finite, (B, C, H, W) bool."""
    return leaf_mask & (original_BCHW.abs() < math.inf)


def latent_coverage(leaf_mask: Tensor, downscale: int) -> Tensor:
    """Return the leaf share of each latent cell, (B, H / downscale, W / downscale) float32."""
    return avg_pool2d(leaf_pixels(leaf_mask)[:, None].float(), downscale).squeeze(1)


def leaf_pixels(leaf_mask: Tensor) -> Tensor:
    """Return which pixels are leaf in at least one band, (B, H, W) bool."""
    return leaf_mask[:, 0] if leaf_mask.shape[1] == 1 else leaf_mask.any(dim=1)


def mask_stats(leaf_mask: Tensor) -> dict[str, Tensor]:
    """Return the coverage of a batch and of its tiles.

    Batches and ranks are combined by adding counts, and by the minimum of `min_coverage` and the maximum of
    `max_coverage`. `coverage` is then `valid_pixels / total_pixels`.

    Args: leaf mask (B, 1|C, H, W) bool.
    Returns: `coverage`, `valid_pixels` and `total_pixels`, each (), and the entries of `tile_stats`.
    """
    leaf = leaf_pixels(leaf_mask)
    pixels_B = leaf.sum(dim=(1, 2))
    valid_pixels = pixels_B.sum()
    total_pixels = torch.full_like(valid_pixels, leaf.numel())
    return {
        "coverage": valid_pixels / total_pixels,
        "valid_pixels": valid_pixels,
        "total_pixels": total_pixels,
        **tile_stats(pixels_B.double() / leaf[0].numel()),
    }


def tile_stats(coverage_T: Tensor) -> dict[str, Tensor]:
    """Return how coverage is distributed over T tiles.

    Returns: `tiles`, `empty_tiles`, `min_coverage` and `max_coverage`, each (); and `histogram`, (10,), the number of
        tiles with a coverage of 0 to 0.1, 0.1 to 0.2, …, 0.9 to 1.
    """
    bins = (coverage_T * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    histogram = (bins[:, None] == torch.arange(NUM_BINS, device=bins.device)).sum(dim=0)
    return {
        "tiles": histogram.sum(),
        "empty_tiles": (coverage_T == 0).sum(),
        "min_coverage": coverage_T.amin(),
        "max_coverage": coverage_T.amax(),
        "histogram": histogram,
    }
