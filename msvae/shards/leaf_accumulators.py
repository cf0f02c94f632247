"""Statistics of the leaf pixels of many tiles, gathered shard by shard and joined in shard order.

Of 8 and 16 bit tiles every number is exact; of float32 tiles percentiles lie within 0.2 % of the value.
Legend: C bands, P pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.leaf_statistics import LeafStatistics
from msvae.shards.statistics import LeafMoments

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
FLOAT_KEY_BITS = 17
"""Sign, exponent and 8 bits of the mantissa: values in one bin differ by less than 1/256."""
MAX_EXACT_PIXELS = 2**20
"""Products of 16 bit values over so many pixels sum up exactly in float64 (2^52)."""


class LeafValues:
    """Leaf pixels of tiles in their stored type: how often each value occurs, and how bands vary together.

    Args: dtype: of the tiles; scale, offset: one entry a band, reflectance = stored * scale + offset.
    """

    def __init__(self, dtype: str, scale: Sequence[float], offset: Sequence[float]) -> None:
        self._dtype, self._scale, self._offset = np.dtype(dtype), list(scale), list(offset)
        num_keys = 2**FLOAT_KEY_BITS if self._is_float else 2 ** (8 * self._dtype.itemsize)
        self._counts = np.zeros((len(self._scale), num_keys), np.int64)
        # Python integers: sums of products outgrow 64 bits
        self._products: NDArray[np.object_] = np.zeros((len(self._scale),) * 2, object)
        self._moments = LeafMoments(len(self._scale))

    @property
    def _is_float(self) -> bool:
        return self._dtype.kind == "f"

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        return self._counts.nbytes

    def share_above(self, reflectance: float) -> float:
        """Share of all values, over all bands, above a reflectance; of float32 tiles within 0.2 % of it."""
        above = 0
        for counts, scale, offset in zip(self._counts, self._scale, self._offset, strict=True):
            keys = np.flatnonzero(counts)
            bright = _values_of_keys(keys, self._dtype) * scale + offset > reflectance
            above += int(counts[keys[bright]].sum())
        return above / max(1, int(self._counts.sum()))

    def add(self, stored_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> None:
        """Take in the leaf pixels of one tile."""
        leaf = np.flatnonzero(leaf_HW)
        if not len(leaf):
            return
        values_CP = stored_CHW.reshape(len(stored_CHW), -1).take(leaf, axis=1)
        for counts, keys in zip(self._counts, _keys(values_CP), strict=True):
            found = np.bincount(keys)  # up to the largest key: all would take longer to clear than to count
            counts[: len(found)] += found
        if self._is_float:
            scale, offset = np.array(self._scale)[:, None], np.array(self._offset)[:, None]
            self._moments.add(values_CP * scale + offset)
            return
        for start in range(0, len(leaf), MAX_EXACT_PIXELS):
            some_CP = values_CP[:, start : start + MAX_EXACT_PIXELS]
            # of two copies, since NumPy's product of an array with itself takes four times as long
            products = some_CP.astype(np.float64) @ some_CP.T.astype(np.float64)
            self._products += products.astype(np.int64).astype(object)

    def join(self, other: LeafValues) -> None:
        """Take in all that another has gathered. For float32 the order decides the last bits."""
        self._counts += other._counts
        self._products += other._products
        self._moments.join(other._moments)

    def save(self, path: Path) -> None:
        """Write what has been gathered to an `.npz` file."""
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
        """Take in what another has saved."""
        with np.load(path, allow_pickle=False) as saved:
            self._counts[saved["band"], saved["key"]] += saved["count"]
            self._products += np.vectorize(int, otypes=[object])(saved["products"])
            moments = LeafMoments(len(self._scale))
            for name in vars(moments):
                value = saved[f"moments_{name}"]
                setattr(moments, name, value if value.ndim else value.item())
            self._moments.join(moments)

    def result(self, coverage_histogram: Sequence[int]) -> LeafStatistics:
        """Statistics of reflectance over all leaf pixels; variances are those of the population."""
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
        """Between the two nearest ranks, as NumPy's default."""
        below = np.cumsum(self._counts[band])
        scale, offset = self._scale[band], self._offset[band]
        rank = (percent if scale >= 0 else 100 - percent) / 100 * (int(below[-1]) - 1)
        keys = np.searchsorted(below, [math.floor(rank), math.ceil(rank)], side="right")
        low, high = _values_of_keys(keys, self._dtype).tolist()
        return float((low + (rank - math.floor(rank)) * (high - low)) * scale + offset)


def _keys(values_CP: NDArray[Any]) -> NDArray[Any]:
    """The bin of each value, a number from 0; larger values never have smaller ones."""
    if values_CP.dtype.kind == "u":
        return values_CP
    if values_CP.dtype.kind == "i":
        return values_CP.view(np.uint16) ^ np.uint16(0x8000)
    # The bits of a float, read as an integer, are in its order once negative ones are turned round.
    bits = values_CP.astype(np.float32, copy=False).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return ordered >> np.uint32(32 - FLOAT_KEY_BITS)


def _values_of_keys(keys: NDArray[np.integer], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The value of each bin; of float32 the middle of the bin."""
    if dtype.kind == "u":
        return keys
    if dtype.kind == "i":
        return keys - 0x8000
    middle = (2 * keys.astype(np.uint32) + np.uint32(1)) << np.uint32(31 - FLOAT_KEY_BITS)
    bits = np.where(middle >> 31, middle & np.uint32(0x7FFFFFFF), ~middle)
    return bits.view(np.float32).astype(np.float64)
