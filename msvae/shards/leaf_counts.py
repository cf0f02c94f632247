"""What is gathered of the leaf pixels of a split, tile by tile, and joined over shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.shards.manifest import LeafStatistics
from msvae.shards.statistics import LeafMoments

COVERAGE_BINS = 10


def coverage_bin(leaf_pixels: int, num_pixels: int) -> int:
    """Which of ten equal parts of 0 to 1 a tile's coverage lies in; the last holds 1."""
    return min(leaf_pixels * COVERAGE_BINS // num_pixels, COVERAGE_BINS - 1)


class LeafCounts:
    """Moments of reflectance over the finite leaf pixels, tiles by coverage, and what is wrong with either.

    Args: scale and offset, one entry a band: reflectance = stored * scale + offset.
    """

    def __init__(self, scale: Sequence[float], offset: Sequence[float]) -> None:
        self._scale, self._offset = (np.array(values)[:, None] for values in (scale, offset))
        self._moments = LeafMoments(len(scale))
        self.coverage_histogram = [0] * COVERAGE_BINS
        self.leaf_pixels = 0
        self.nonfinite_pixels = 0
        """Leaf pixels with a band that is NaN or infinite; moments leave them out."""
        self.empty_tiles = 0

    def add(self, tile_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> int:
        """Take in a tile, stored type; returns how many of its leaf pixels are not finite."""
        stored_CP = tile_CHW[:, leaf_HW]
        num_leaf: int = stored_CP.shape[1]
        self.coverage_histogram[coverage_bin(num_leaf, leaf_HW.size)] += 1
        self.empty_tiles += num_leaf == 0
        finite_P = np.isfinite(stored_CP).all(axis=0)
        num_finite = int(finite_P.sum())
        if num_finite < num_leaf:
            stored_CP = stored_CP[:, finite_P]
        self._moments.add(stored_CP * self._scale + self._offset)
        self.leaf_pixels += num_leaf
        self.nonfinite_pixels += num_leaf - num_finite
        return num_leaf - num_finite

    def join(self, other: LeafCounts) -> None:
        """Take in what was gathered of other tiles."""
        self._moments.join(other._moments)
        self.leaf_pixels += other.leaf_pixels
        self.nonfinite_pixels += other.nonfinite_pixels
        self.empty_tiles += other.empty_tiles
        self.coverage_histogram = [
            a + b for a, b in zip(self.coverage_histogram, other.coverage_histogram, strict=True)
        ]

    def statistics(self) -> LeafStatistics:
        """For the manifest.

        Raises: ValueError when there was no finite leaf pixel.
        """
        if self.leaf_pixels == self.nonfinite_pixels:
            raise ValueError("no finite leaf pixel in any tile: all masks are empty, or white is not leaf in them")
        return self._moments.result().model_copy(update={"coverage_histogram": self.coverage_histogram})
