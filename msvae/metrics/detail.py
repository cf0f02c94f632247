"""Further sums of each tile for a report: signed and absolute error, SID, deciles of brightness, leaf edge."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from msvae.bands import Bands
from msvae.metrics.histograms import NUM_DECILES, BrightnessDeciles
from msvae.metrics.tile_sums import INDICES, LeafPixels, index_sums

EDGE_PX = 4
"""Width of the edge zone of a leaf, in pixels: half a latent cell. A diagonal neighbour has the distance 1."""
SID_FLOOR = 1e-4
"""Smallest reflectance in the spectral information divergence, which uses logarithms. Lower values are raised."""
NUM_ZONES = 2
"""Number of leaf zones: edge, interior."""


def detail_sums(
    pixels: LeafPixels, leaf_mask_B1HW: Tensor, bands: Bands, deciles: BrightnessDeciles
) -> dict[str, Tensor]:
    """Return further sums over the finite leaf pixels of each tile, float64.

    Returns: `absolute_error` and `error` (reconstruction minus original), (B, C); `sid` (B,), over pixels that have an
        angle; `index_sums` of all indices; and for the `decile` of brightness, (B, 10), and the `zone` of the leaf
        (edge, interior), (B, 2): `KIND_pixels`, `KIND_squared_error` (mean over bands), `KIND_angles`,
        `KIND_angle_deg`.
    """
    zone = torch.where(is_edge(leaf_mask_B1HW), 0, 1)
    return {
        "absolute_error": pixels.error.abs().sum(dim=(2, 3)),
        "error": pixels.error.sum(dim=(2, 3)),
        "sid": torch.where(pixels.has_angle, information_divergence(pixels.recon, pixels.target), 0.0).sum(dim=(1, 2)),
        **index_sums(pixels, bands, INDICES),
        **_sums_by_class(pixels, "decile", deciles(pixels.brightness), NUM_DECILES),
        **_sums_by_class(pixels, "zone", zone, NUM_ZONES),
    }


def information_divergence(u_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """Return the spectral information divergence (Chang 2000) in nats, (B, H, W). Spectra of equal shape have 0.

    Both spectra are divided by their sums to p and q. The divergence is the sum of p log(p / q) and q log(q / p) over
    the bands. It needs positive values, so reflectance below `SID_FLOOR` counts as `SID_FLOOR`.
    """
    u, v = u_BCHW.clamp(min=SID_FLOOR), v_BCHW.clamp(min=SID_FLOOR)
    p, q = u / u.sum(dim=1, keepdim=True), v / v.sum(dim=1, keepdim=True)
    return ((p - q) * (p.log() - q.log())).sum(dim=1)


def is_edge(leaf_mask_B1HW: Tensor) -> Tensor:
    """Return True for leaf pixels within `EDGE_PX` of background, (B, H, W). The border of a tile is not an edge."""
    background = (~leaf_mask_B1HW).float()
    # pooling pads with -inf, so pixels outside the tile do not count as background
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
