"""From sums of each tile to the numbers of a split: columns are added in tile order and divided once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.metrics.aggregate import measures, plain

TileSums = Mapping[str, NDArray[np.float64]]
"""Columns of sums, (T,) or (T, K): one row a tile, in stored order."""


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


def summarise(sums: TileSums) -> Summary:
    """Divide once what all tiles add up to.

    Raises: ValueError when the split has no leaf pixel.
    """
    totals = total(sums)
    numbers = plain(measures(totals))
    return Summary(
        psnr_db=numbers["psnr_db"],
        angle_deg=numbers["angle_deg"],
        ndvi_mae=numbers.get("ndvi_mae"),
        ndre_mae=numbers.get("ndre_mae"),
        ssim=numbers.get("ssim"),
        rmse_per_band=numbers["rmse_per_band"],
        num_tiles=len(sums["num_pixels"]),
        num_leaf_pixels=int(totals["num_pixels"][0]),
    )


def total(sums: TileSums) -> TileSums:
    """All rows added to one.

    Raises: ValueError when there is no leaf pixel.
    """
    check_leaf(sums["num_pixels"])
    return {name: column.sum(axis=0, keepdims=True) for name, column in sums.items()}


def check_leaf(num_pixels: NDArray[Any]) -> None:
    """Raises: ValueError when there is no leaf pixel."""
    if not num_pixels.any():
        raise ValueError("the split has no leaf pixel, so nothing can be measured; pack it with another --mask")


def by_class(sums: TileSums, class_of_row: NDArray[np.int64], num_classes: int) -> dict[str, NDArray[np.float64]]:
    """Rows of each class added to one, in their order: those of an image, or of a group of images."""
    added = {name: np.zeros((num_classes, *column.shape[1:])) for name, column in sums.items()}
    for name, column in sums.items():
        np.add.at(added[name], class_of_row, column)
    return added
