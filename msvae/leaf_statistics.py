"""Statistics of the reflectance of leaf pixels: what a split measures, and what a model standardises with."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeInt


class LeafStatistics(BaseModel):
    """Moments of reflectance over the leaf pixels of the training split, one entry per band."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_pixels: NonNegativeInt
    mean: list[float]
    std: list[float]
    minimum: list[float]
    maximum: list[float]
    covariance: list[list[float]]
    percentiles: dict[str, list[float]] = {}
    """Percentiles of each band, by percentage such as `"5"`."""
    coverage_histogram: list[NonNegativeInt] = []
    """Number of training tiles by coverage, in ten equal bins from 0 to 1."""
