"""What stands outside the leaf when the encoder looks: with `fill`, nothing that came from the picture."""

from __future__ import annotations

import torch
from torch import Tensor


def standardise(x_BCHW: Tensor, valid_BCHW: Tensor, mean_C: Tensor, std_C: Tensor, background: str) -> Tensor:
    """Reflectance to units of each band's spread over training leaves, (B, C, H, W).

    Background `fill` puts the mean leaf spectrum (0) wherever `valid` is False: GroupNorm and attention would
    otherwise carry the background into leaf pixels. `keep` replaces only what is not finite.
    """
    standardised = (x_BCHW - mean_C[:, None, None]) / std_C[:, None, None]
    shown = x_BCHW.isfinite() if background == "keep" else valid_BCHW
    return torch.where(shown, standardised, 0.0)


def to_reflectance(standardised_BCHW: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """The way back, (B, C, H, W)."""
    return standardised_BCHW * std_C[:, None, None] + mean_C[:, None, None]
