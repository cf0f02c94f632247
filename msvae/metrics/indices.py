"""Vegetation indices of leaf spectra, of reflectance that is not negative."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from msvae.bands import MIN_INDEX_SUM, Bands
from msvae.metrics.tile_sums import LeafPixels

MIN_RED_EDGE = 0.01
"""Smallest red-edge reflectance that CIre is divided by: leaves reflect far more, and below it the ratio explodes."""


class Index(NamedTuple):
    """Two bands by role, and the index of their reflectance."""

    first: str
    second: str
    of: Callable[[Tensor, Tensor], Tensor]


def normalised_difference(first: Tensor, second: Tensor) -> Tensor:
    """(a - b) / (a + b); within -1..1."""
    a, b = first.clamp(min=0), second.clamp(min=0)
    return (a - b) / (a + b).clamp(min=MIN_INDEX_SUM)


def chlorophyll_index(first: Tensor, second: Tensor) -> Tensor:
    """a / b - 1, the red-edge chlorophyll index (Gitelson, Gritz, Merzlyak 2003)."""
    return first.clamp(min=0) / second.clamp(min=MIN_RED_EDGE) - 1


INDICES = {
    "ndvi": Index("nir", "red", normalised_difference),
    "ndre": Index("nir", "red_edge", normalised_difference),
    "gndvi": Index("nir", "green", normalised_difference),
    "cire": Index("nir", "red_edge", chlorophyll_index),
}


def index_sums(pixels: LeafPixels, bands: Bands, names: Iterable[str]) -> dict[str, Tensor]:
    """For each named index that the bands allow, sums over the leaf of each tile, (B,): `NAME_error`, the absolute
    error, and `NAME_signed_error`, that of reconstruction less original.
    """
    sums = {}
    for name in names:
        index = INDICES[name]
        if bands.has(index.first, index.second):
            pair = bands.index(index.first), bands.index(index.second)
            recon, target = (index.of(*(x[:, band] for band in pair)) for x in (pixels.recon, pixels.target))
            # off the leaf both sides are 0, and so is their difference
            sums[f"{name}_error"] = (recon - target).abs().sum(dim=(1, 2))
            sums[f"{name}_signed_error"] = (recon - target).sum(dim=(1, 2))
    return sums
