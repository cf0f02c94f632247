"""Leaf pixels of a batch and of its reconstruction, ready to be judged. B batch, C bands, H, W pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MIN_NORM = 1e-6
"""Shortest spectrum, in reflectance, that has a direction."""


@dataclass(frozen=True)
class LeafPixels:
    """Both sides (B, C, H, W), float64 reflectance, 0 where `leaf` (B, H, W) is False."""

    recon: Tensor
    target: Tensor
    leaf: Tensor

    @classmethod
    def of(cls, recon_BCHW: Tensor, target_BCHW: Tensor, leaf_mask_B1HW: Tensor) -> LeafPixels:
        """Leaf pixels whose original is finite in every band; what else stands there never matters."""
        leaf = leaf_mask_B1HW.any(dim=1) & target_BCHW.isfinite().all(dim=1)
        recon, target = (torch.where(leaf[:, None], x.double(), 0.0) for x in (recon_BCHW, target_BCHW))
        return cls(recon, target, leaf)

    @cached_property
    def has_angle(self) -> Tensor:
        """Pixels whose original has a direction, (B, H, W) bool."""
        long_enough: Tensor = self.target.norm(dim=1) > MIN_NORM
        return self.leaf & long_enough

    @cached_property
    def angle_deg(self) -> Tensor:
        """Spectral angle, (B, H, W), 0 where there is none."""
        return torch.where(self.has_angle, torch.rad2deg(angle_rad(self.recon, self.target)), 0.0)

    @cached_property
    def error(self) -> Tensor:
        """Reconstruction less original, (B, C, H, W)."""
        return self.recon - self.target

    @cached_property
    def brightness(self) -> Tensor:
        """Mean reflectance of the original over the bands, (B, H, W)."""
        return self.target.mean(dim=1)


def angle_rad(u_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """Angle between spectra along dim 1, (B, H, W), by atan2 (Kahan 2006); pi / 2 to a zero spectrum."""
    u = u_BCHW / u_BCHW.norm(dim=1, keepdim=True).clamp(min=1e-12)
    v = v_BCHW / v_BCHW.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
