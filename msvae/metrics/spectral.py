"""How far reconstructed leaf spectra are from the originals: sums for each tile, in float64 and reflectance."""

from __future__ import annotations

from torch import Tensor

from msvae.bands import NORMALISED_DIFFERENCES, Bands
from msvae.metrics.indices import index_sums
from msvae.metrics.tile_sums import LeafPixels


def spectral_sums(pixels: LeafPixels, bands: Bands) -> dict[str, Tensor]:
    """Sums over the finite leaf pixels of each tile, float64.

    `num_pixels` (B,); `squared_error` (B, C); `angle_deg` and its `num_angles` (zero spectra have none), (B,);
    absolute errors of the normalised differences that the bands allow, `NAME_error` (B,).
    """
    return {
        "num_pixels": pixels.leaf.sum(dim=(1, 2)).double(),
        "squared_error": pixels.error.square().sum(dim=(2, 3)),
        "angle_deg": pixels.angle_deg.sum(dim=(1, 2)),
        "num_angles": pixels.has_angle.sum(dim=(1, 2)).double(),
        **index_sums(pixels, bands, NORMALISED_DIFFERENCES),
    }
