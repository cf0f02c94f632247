"""Statistics of reflectance over leaf pixels: a manifest stores them, and a model standardises with them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeInt


class LeafStatistics(BaseModel):
    """Statistics of reflectance over the leaf pixels of the training split, with one entry per band."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_pixels: NonNegativeInt
    """Number of leaf pixels."""
    mean: list[float]
    std: list[float]
    minimum: list[float]
    maximum: list[float]
    covariance: list[list[float]]
    """Covariance matrix of the bands."""
    percentiles: dict[str, list[float]] = {}
    """Percentiles of each band; the keys are percentages such as `"5"`."""
    coverage_histogram: list[NonNegativeInt] = []
    """Number of training tiles by coverage, in ten equal bins from 0 to 1."""
