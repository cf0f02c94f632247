"""Accumulators for statistics of leaf pixels: filled tile by tile, then joined in shard order.

Statistics of 8 and 16 bit tiles are exact. For float32 tiles, percentiles are within 0.2 % of the value.
Dimensions: C bands, P pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.bands import LeafStatistics

COVERAGE_BINS = 10
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
FLOAT_KEY_BITS = 17
"""Bits of the bin of a float: sign, exponent and 8 bits of the mantissa. Values in a bin differ by under 1/256."""
MAX_EXACT_PIXELS = 2**20
"""Largest number of pixels over which products of 16 bit values have an exact sum in float64 (below 2^52)."""
MAX_BYTES_IN_FLIGHT = 2**30
"""Memory limit of the accumulators of shards that are read at the same time or wait to be joined."""


def coverage_bin(leaf_pixels: int, num_pixels: int) -> int:
    """Return the bin of a tile's coverage among ten equal bins from 0 to 1. The last bin includes 1."""
    return min(leaf_pixels * COVERAGE_BINS // num_pixels, COVERAGE_BINS - 1)


class LeafCounts:
    """`LeafValues` of the finite leaf pixels, the coverage of tiles, and counts of bad pixels and empty tiles.

    Args:
        dtype: type of the tiles.
        scale, offset: one entry per band, reflectance = stored * scale + offset.
    """

    def __init__(self, dtype: str, scale: Sequence[float], offset: Sequence[float]) -> None:
        self._values = LeafValues(dtype, scale, offset)
        self.coverage_histogram = [0] * COVERAGE_BINS
        self.leaf_pixels = 0
        self.nonfinite_pixels = 0
        """Number of leaf pixels with NaN or infinity in any band. The statistics exclude them."""
        self.empty_tiles = 0

    def add(self, tile_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> int:
        """Add one tile in its stored type. Returns: the number of its leaf pixels that are not finite."""
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
        """Add the content of another accumulator."""
        self._values.join(other._values)
        self.leaf_pixels += other.leaf_pixels
        self.nonfinite_pixels += other.nonfinite_pixels
        self.empty_tiles += other.empty_tiles
        self.coverage_histogram = [
            a + b for a, b in zip(self.coverage_histogram, other.coverage_histogram, strict=True)
        ]

    def share_above(self, reflectance: float) -> float:
        """Return the share of the finite leaf values, over all bands, above a reflectance."""
        return self._values.share_above(reflectance)

    def threads_that_fit(self, num_threads: int) -> int:
        """Return the number of threads, at most `num_threads`, for which one accumulator per shard fits into memory.

        Histograms of floats with hundreds of bands need hundreds of MiB.
        """
        # `in_order` keeps two shards per thread and one more, and one accumulator sums them up
        fitting = (MAX_BYTES_IN_FLIGHT // self._values.num_bytes - 2) // 2
        return max(1, min(num_threads, fitting))

    def statistics(self) -> LeafStatistics:
        """Return the statistics for the manifest.

        Raises: ValueError if no leaf pixel is finite.
        """
        if self.leaf_pixels == self.nonfinite_pixels:
            raise ValueError(
                "no finite leaf pixel in any tile: all masks are empty, or white does not mean leaf in them; "
                "make masks with white leaves"
            )
        return self._values.result(self.coverage_histogram)


class LeafValues:
    """Histogram of the stored values of each band, and products of bands for their covariance.

    Args:
        dtype: type of the tiles.
        scale, offset: one entry per band, reflectance = stored * scale + offset.
    """

    def __init__(self, dtype: str, scale: Sequence[float], offset: Sequence[float]) -> None:
        self._dtype, self._scale, self._offset = np.dtype(dtype), list(scale), list(offset)
        num_keys = 2**FLOAT_KEY_BITS if self._is_float else 2 ** (8 * self._dtype.itemsize)
        self._counts = np.zeros((len(self._scale), num_keys), np.int64)
        # Python integers, because sums of products exceed 64 bits
        self._products: NDArray[np.object_] = np.zeros((len(self._scale),) * 2, object)
        self._moments = LeafMoments(len(self._scale))

    @property
    def _is_float(self) -> bool:
        return self._dtype.kind == "f"

    @property
    def num_bytes(self) -> int:
        """Size of the histograms in memory."""
        return self._counts.nbytes

    def share_above(self, reflectance: float) -> float:
        """Return the share of all values, over all bands, above a reflectance (for float32 within 0.2 % of it)."""
        above = 0
        for counts, scale, offset in zip(self._counts, self._scale, self._offset, strict=True):
            keys = np.flatnonzero(counts)
            bright = _values_of_keys(keys, self._dtype) * scale + offset > reflectance
            above += int(counts[keys[bright]].sum())
        return above / max(1, int(self._counts.sum()))

    def add(self, stored_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> None:
        """Add the leaf pixels of one tile (C, H, W) in its stored type."""
        leaf = np.flatnonzero(leaf_HW)
        if not len(leaf):
            return
        values_CP = stored_CHW.reshape(len(stored_CHW), -1).take(leaf, axis=1)
        for counts, keys in zip(self._counts, _keys(values_CP), strict=True):
            # bins up to the largest key only, because clearing all bins would take longer than counting
            found = np.bincount(keys)
            counts[: len(found)] += found
        if self._is_float:
            scale, offset = np.array(self._scale)[:, None], np.array(self._offset)[:, None]
            self._moments.add(values_CP * scale + offset)
            return
        for start in range(0, len(leaf), MAX_EXACT_PIXELS):
            some_CP = values_CP[:, start : start + MAX_EXACT_PIXELS]
            # two copies, because NumPy's product of an array with itself takes four times as long
            products = some_CP.astype(np.float64) @ some_CP.T.astype(np.float64)
            self._products += products.astype(np.int64).astype(object)

    def join(self, other: LeafValues) -> None:
        """Add the content of another accumulator. For float32 the order of these calls affects the last bits."""
        self._counts += other._counts
        self._products += other._products
        self._moments.join(other._moments)

    def save(self, path: Path) -> None:
        """Write the content to an `.npz` file."""
        band, key = np.nonzero(self._counts)
        np.savez(
            path,
            band=band,
            key=key,
            count=self._counts[band, key],
            products=self._products.astype(str),
            **{f"moments_{name}": value for name, value in vars(self._moments).items()},
        )

    def join_saved(self, path: Path) -> None:
        """Add the content of a file that `save` wrote."""
        with np.load(path, allow_pickle=False) as saved:
            self._counts[saved["band"], saved["key"]] += saved["count"]
            self._products += np.vectorize(int, otypes=[object])(saved["products"])
            moments = LeafMoments(len(self._scale))
            for name in vars(moments):
                value = saved[f"moments_{name}"]
                setattr(moments, name, value if value.ndim else value.item())
            self._moments.join(moments)

    def result(self, coverage_histogram: Sequence[int]) -> LeafStatistics:
        """Return statistics of reflectance over all leaf pixels, with variances of the population."""
        moments = self._moments.result() if self._is_float else self._exact_moments()
        num_bands = range(len(self._scale))
        percentiles = {
            str(percent): [
                min(max(self._percentile(band, percent), moments.minimum[band]), moments.maximum[band])
                for band in num_bands
            ]
            for percent in PERCENTILES
        }
        return moments.model_copy(update={"percentiles": percentiles, "coverage_histogram": list(coverage_histogram)})

    def _exact_moments(self) -> LeafStatistics:
        num_pixels = int(self._counts[0].sum())
        assert num_pixels > 0, "no leaf pixel was added"
        levels = _values_of_keys(np.arange(self._counts.shape[1]), self._dtype)
        sums = [int(total) for total in self._counts @ levels.astype(np.int64)]
        bands = range(len(sums))
        covariance = [
            [
                self._scale[i] * self._scale[j]
                * float(Fraction(int(self._products[i, j]) * num_pixels - sums[i] * sums[j], num_pixels**2))
                for j in bands
            ]
            for i in bands
        ]  # fmt: skip
        ends = []
        for counts, scale, offset in zip(self._counts, self._scale, self._offset, strict=True):
            present = levels[np.flatnonzero(counts)[[0, -1]]]
            ends.append(sorted(float(level) * scale + offset for level in present))
        return LeafStatistics(
            num_pixels=num_pixels,
            mean=[float(Fraction(sums[i], num_pixels)) * self._scale[i] + self._offset[i] for i in bands],
            std=[math.sqrt(covariance[i][i]) for i in bands],
            minimum=[low for low, _ in ends],
            maximum=[high for _, high in ends],
            covariance=covariance,
        )

    def _percentile(self, band: int, percent: float) -> float:
        """Return a percentile, interpolated between the two nearest ranks as NumPy does by default."""
        below = np.cumsum(self._counts[band])
        scale, offset = self._scale[band], self._offset[band]
        rank = (percent if scale >= 0 else 100 - percent) / 100 * (int(below[-1]) - 1)
        keys = np.searchsorted(below, [math.floor(rank), math.ceil(rank)], side="right")
        low, high = _values_of_keys(keys, self._dtype).tolist()
        return float((low + (rank - math.floor(rank)) * (high - low)) * scale + offset)


def _keys(values_CP: NDArray[Any]) -> NDArray[Any]:
    """Return the bin of each value, an integer from 0 that never decreases with the value."""
    if values_CP.dtype.kind == "u":
        return values_CP
    if values_CP.dtype.kind == "i":
        return values_CP.view(np.uint16) ^ np.uint16(0x8000)
    # the bits of floats, read as integers, sort like the floats, after the bits of negative floats are inverted
    bits = values_CP.astype(np.float32, copy=False).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return ordered >> np.uint32(32 - FLOAT_KEY_BITS)


def _values_of_keys(keys: NDArray[np.integer], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the value of each bin. For float32 it is the centre of the bin."""
    if dtype.kind == "u":
        return keys
    if dtype.kind == "i":
        return keys - 0x8000
    middle = (2 * keys.astype(np.uint32) + np.uint32(1)) << np.uint32(31 - FLOAT_KEY_BITS)
    bits = np.where(middle >> 31, middle & np.uint32(0x7FFFFFFF), ~middle)
    return bits.view(np.float32).astype(np.float64)


class LeafMoments:
    """Mean, extremes and covariance of all added pixels in one pass (Chan, Golub, LeVeque 1979), in float64."""

    def __init__(self, num_bands: int) -> None:
        self._num_pixels = 0
        self._mean = np.zeros(num_bands)
        self._comoment = np.zeros((num_bands, num_bands))
        self._minimum = np.full(num_bands, np.inf)
        self._maximum = np.full(num_bands, -np.inf)

    def add(self, reflectance_CP: NDArray[np.float64]) -> None:
        """Add the leaf pixels (C, P) of one tile."""
        added = reflectance_CP.shape[1]
        if added == 0:
            return
        tile = LeafMoments(len(self._mean))
        tile._num_pixels = added
        tile._mean = reflectance_CP.mean(axis=1)
        centred_CP = reflectance_CP - tile._mean[:, None]
        # einsum instead of a matrix product, because its sums do not depend on the number of threads
        tile._comoment = np.einsum("ip,jp->ij", centred_CP, centred_CP)
        tile._minimum, tile._maximum = reflectance_CP.min(axis=1), reflectance_CP.max(axis=1)
        self.join(tile)

    def join(self, other: LeafMoments) -> None:
        """Add the content of another accumulator."""
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
        """Return the statistics, with variances of the population (divided by the number of pixels)."""
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
