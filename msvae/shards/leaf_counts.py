"""What is gathered of the leaf pixels of a split, tile by tile, and joined over shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.leaf_statistics import LeafStatistics
from msvae.shards.leaf_accumulators import LeafValues

COVERAGE_BINS = 10
MAX_BYTES_IN_FLIGHT = 2**30
"""Of the counts of shards that are read at the same time or wait for their turn."""


def coverage_bin(leaf_pixels: int, num_pixels: int) -> int:
    """Which of ten equal parts of 0 to 1 a tile's coverage lies in; the last holds 1."""
    return min(leaf_pixels * COVERAGE_BINS // num_pixels, COVERAGE_BINS - 1)


class LeafCounts:
    """Values of the finite leaf pixels, tiles by coverage, and what is wrong with either.

    Args: type of the tiles; scale and offset, one entry a band: reflectance = stored * scale + offset.
    """

    def __init__(self, dtype: str, scale: Sequence[float], offset: Sequence[float]) -> None:
        self._values = LeafValues(dtype, scale, offset)
        self.coverage_histogram = [0] * COVERAGE_BINS
        self.leaf_pixels = 0
        self.nonfinite_pixels = 0
        """Leaf pixels with a band that is NaN or infinite; the values leave them out."""
        self.empty_tiles = 0

    def add(self, tile_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> int:
        """Take in a tile, stored type; returns how many of its leaf pixels are not finite."""
        num_leaf = int(np.count_nonzero(leaf_HW))
        self.coverage_histogram[coverage_bin(num_leaf, leaf_HW.size)] += 1
        self.empty_tiles += num_leaf == 0
        finite_HW = leaf_HW
        if tile_CHW.dtype.kind == "f":
            finite_HW = leaf_HW & np.isfinite(tile_CHW).all(axis=0)
        num_finite = int(np.count_nonzero(finite_HW))
        self._values.add(tile_CHW, finite_HW)
        self.leaf_pixels += num_leaf
        self.nonfinite_pixels += num_leaf - num_finite
        return num_leaf - num_finite

    def join(self, other: LeafCounts) -> None:
        """Take in what was gathered of other tiles."""
        self._values.join(other._values)
        self.leaf_pixels += other.leaf_pixels
        self.nonfinite_pixels += other.nonfinite_pixels
        self.empty_tiles += other.empty_tiles
        self.coverage_histogram = [
            a + b for a, b in zip(self.coverage_histogram, other.coverage_histogram, strict=True)
        ]

    def share_above(self, reflectance: float) -> float:
        """Share of the finite leaf values, over all bands, above a reflectance."""
        return self._values.share_above(reflectance)

    def threads_that_fit(self, num_threads: int) -> int:
        """As many of `num_threads` as memory allows when each shard has counts like these: floats of hundreds of
        bands take hundreds of MiB."""
        # `in_order` has two shards a thread and one more, and they are joined to one
        fitting = (MAX_BYTES_IN_FLIGHT // self._values.num_bytes - 2) // 2
        return max(1, min(num_threads, fitting))

    def statistics(self) -> LeafStatistics:
        """For the manifest.

        Raises: ValueError when there was no finite leaf pixel.
        """
        if self.leaf_pixels == self.nonfinite_pixels:
            raise ValueError("no finite leaf pixel in any tile: all masks are empty, or white is not leaf in them")
        return self._values.result(self.coverage_histogram)
