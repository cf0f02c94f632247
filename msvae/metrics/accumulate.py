"""From sums of each tile to the numbers of a split: columns are added in tile order and divided once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msvae.bands import NORMALISED_DIFFERENCES, Bands

PEAK_REFLECTANCE = 1.0
SMALLEST_MSE = 1e-20
"""An exact reconstruction is reported as 200 dB."""

TileSums = Mapping[str, NDArray[np.float64]]
"""One column a sum, one row a tile, in stored order."""


@dataclass(frozen=True)
class Summary:
    """A reconstruction of a split in numbers: leaf pixels only, reflectance units. None: not measurable."""

    psnr_db: float
    """Against a peak reflectance of 1, over all bands."""
    angle_deg: float | None
    """Mean spectral angle."""
    ndvi_mae: float | None
    ndre_mae: float | None
    ssim: float | None
    """Mean over bands and windows that lie inside the leaf."""
    rmse_per_band: list[float]
    num_tiles: int
    num_leaf_pixels: int


def summarise(sums: TileSums, bands: Bands) -> Summary:
    """Divide once what all tiles add up to.

    Raises: ValueError when the split has no leaf pixel.
    """
    num_pixels = float(sums["num_pixels"].sum())
    if not num_pixels:
        raise ValueError("the split has no leaf pixel, so nothing can be measured; pack it with another --mask")
    mse = np.array([sums[f"squared_error/{i}"].sum() for i in range(len(bands))]) / num_pixels
    index_errors = {index: sums.get(f"{index}_error") for index in NORMALISED_DIFFERENCES}
    mae = {
        index: None if errors is None else float(errors.sum()) / num_pixels for index, errors in index_errors.items()
    }
    return Summary(
        psnr_db=10 * math.log10(PEAK_REFLECTANCE**2 / max(float(mse.mean()), SMALLEST_MSE)),
        angle_deg=_ratio(sums["angle_deg"], sums["num_angles"]),
        ndvi_mae=mae["ndvi"],
        ndre_mae=mae["ndre"],
        ssim=_ratio(sums["ssim"], sums["num_ssim"]),
        rmse_per_band=np.sqrt(mse).tolist(),
        num_tiles=len(sums["num_pixels"]),
        num_leaf_pixels=int(num_pixels),
    )


def tile_rmse(sums: TileSums, bands: Bands) -> NDArray[np.float64]:
    """Root mean squared error of each tile over its leaf pixels and all bands, in reflectance."""
    squared = np.sum([sums[f"squared_error/{i}"] for i in range(len(bands))], axis=0)
    rmse: NDArray[np.float64] = np.sqrt(squared / np.maximum(sums["num_pixels"] * len(bands), 1))
    return rmse


def _ratio(total: NDArray[np.float64], count: NDArray[np.float64]) -> float | None:
    return float(total.sum() / count.sum()) if count.sum() else None
