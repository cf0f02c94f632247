"""What a report tells beside the numbers of every validation: sums for each tile, float64, leaf pixels only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from msvae.bands import Bands
from msvae.metrics.brightness import NUM_DECILES, DecileOf
from msvae.metrics.indices import INDICES, index_sums
from msvae.metrics.tile_sums import LeafPixels

EDGE_PX = 4
"""Half a latent cell: leaf pixels with background this near, diagonals included, are the leaf's edge band."""
SID_FLOOR = 1e-4
"""Reflectance below this counts as this in the spectral information divergence, which takes logarithms."""
NUM_ZONES = 2
"""Edge band, interior."""


def detail_sums(pixels: LeafPixels, leaf_mask_B1HW: Tensor, bands: Bands, decile_of: DecileOf) -> dict[str, Tensor]:
    """Sums over the finite leaf pixels of each tile.

    `absolute_error` and `error`, reconstruction less original, (B, C); `sid` (B,), over pixels that have an angle;
    those of `index_sums` for every index; and `KIND_pixels`, `KIND_squared_error` (mean over bands), `KIND_angles`
    and `KIND_angle_deg` for the `decile` of brightness (B, 10) and the `zone` of the leaf (B, 2): edge, interior.
    """
    zone = torch.where(edge_band(leaf_mask_B1HW), 0, 1)
    return {
        "absolute_error": pixels.error.abs().sum(dim=(2, 3)),
        "error": pixels.error.sum(dim=(2, 3)),
        "sid": torch.where(pixels.has_angle, information_divergence(pixels.recon, pixels.target), 0.0).sum(dim=(1, 2)),
        **index_sums(pixels, bands, INDICES),
        **_sums_by_class(pixels, "decile", decile_of(pixels.brightness), NUM_DECILES),
        **_sums_by_class(pixels, "zone", zone, NUM_ZONES),
    }


def information_divergence(u_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """Spectral information divergence in nats, (B, H, W), 0 for spectra of one shape.

    Chang 2000: both spectra are divided by their sums to p and q; sum of p log(p / q) and q log(q / p) over the bands.
    It needs positive values, so reflectance below `SID_FLOOR` counts as that.
    """
    u, v = u_BCHW.clamp(min=SID_FLOOR), v_BCHW.clamp(min=SID_FLOOR)
    p, q = u / u.sum(dim=1, keepdim=True), v / v.sum(dim=1, keepdim=True)
    return ((p - q) * (p.log() - q.log())).sum(dim=1)


def edge_band(leaf_mask_B1HW: Tensor) -> Tensor:
    """Leaf pixels within `EDGE_PX` of one that is not leaf, (B, H, W) bool. A tile's border is no leaf's border."""
    background = (~leaf_mask_B1HW).float()
    # pooling pads with -inf, so what lies beyond the tile is not taken for background
    near = max_pool2d(background, 2 * EDGE_PX + 1, stride=1, padding=EDGE_PX) > 0
    return (leaf_mask_B1HW & near)[:, 0]


def _sums_by_class(pixels: LeafPixels, kind: str, class_BHW: Tensor, num_classes: int) -> dict[str, Tensor]:
    def sums(select: Tensor, values: Tensor) -> Tensor:
        parts = [torch.where(select & (class_BHW == i), values, 0.0).sum(dim=(1, 2)) for i in range(num_classes)]
        return torch.stack(parts, dim=1)

    one = torch.ones_like(pixels.angle_deg)
    return {
        f"{kind}_pixels": sums(pixels.leaf, one),
        f"{kind}_squared_error": sums(pixels.leaf, pixels.error.square().mean(dim=1)),
        f"{kind}_angles": sums(pixels.has_angle, one),
        f"{kind}_angle_deg": sums(pixels.has_angle, pixels.angle_deg),
    }
