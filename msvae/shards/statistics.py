"""Moments of leaf reflectance, gathered tile by tile in one pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from msvae.leaf_statistics import LeafStatistics


class LeafMoments:
    """Mean, extremes and covariance over all leaf pixels added so far (Chan, Golub, LeVeque 1979), in float64."""

    def __init__(self, num_bands: int) -> None:
        self._num_pixels = 0
        self._mean = np.zeros(num_bands)
        self._comoment = np.zeros((num_bands, num_bands))
        self._minimum = np.full(num_bands, np.inf)
        self._maximum = np.full(num_bands, -np.inf)

    def add(self, reflectance_CP: NDArray[np.float64]) -> None:
        """Take in the leaf pixels of one tile, (C, P)."""
        added = reflectance_CP.shape[1]
        if added == 0:
            return
        tile = LeafMoments(len(self._mean))
        tile._num_pixels = added
        tile._mean = reflectance_CP.mean(axis=1)
        centred_CP = reflectance_CP - tile._mean[:, None]
        # einsum and not a matrix product: its sums do not depend on the number of threads.
        tile._comoment = np.einsum("ip,jp->ij", centred_CP, centred_CP)
        tile._minimum, tile._maximum = reflectance_CP.min(axis=1), reflectance_CP.max(axis=1)
        self.join(tile)

    def join(self, other: LeafMoments) -> None:
        """Take in all that another has gathered."""
        if other._num_pixels == 0:
            return
        total = self._num_pixels + other._num_pixels
        delta = other._mean - self._mean
        self._comoment += other._comoment
        self._comoment += np.outer(delta, delta) * (self._num_pixels * other._num_pixels / total)
        self._mean += delta * (other._num_pixels / total)
        self._minimum = np.minimum(self._minimum, other._minimum)
        self._maximum = np.maximum(self._maximum, other._maximum)
        self._num_pixels = total

    def result(self) -> LeafStatistics:
        """What has been gathered; variances are those of the population (divided by the number of pixels)."""
        assert self._num_pixels > 0, "no leaf pixel was added"
        covariance = self._comoment / self._num_pixels
        return LeafStatistics(
            num_pixels=self._num_pixels,
            mean=self._mean.tolist(),
            std=np.sqrt(np.diag(covariance)).tolist(),
            minimum=self._minimum.tolist(),
            maximum=self._maximum.tolist(),
            covariance=covariance.tolist(),
        )
