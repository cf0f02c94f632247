"""Percentiles and moments of leaf pixels, whatever the type and however the tiles were divided."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from msvae.shards.leaf_accumulators import LeafValues

SCALE, OFFSET = [0.001, -0.5, 2.0], [0.0, 1.0, -3.0]
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def tiles_of(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    spread = {"uint8": 30.0, "float32": 0.2}.get(dtype, 3000.0)
    values = rng.normal(spread, spread, (12, 1, 24, 24)) * np.array([1, 0.5, 0.1])[:, None, None]
    values += rng.normal(0, spread, (12, 3, 24, 24)) * 0.3
    if dtype.startswith("u"):
        values = values.clip(0, np.iinfo(dtype).max)
    return values.astype(dtype), rng.random((12, 24, 24)) < np.linspace(0, 1, 12)[:, None, None]


def gathered(dtype, tiles, masks):
    values = LeafValues(dtype, SCALE, OFFSET)
    for tile, mask in zip(tiles, masks, strict=True):
        values.add(tile, mask)
    return values


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_accumulated_statistics_equal_those_of_all_leaf_pixels_at_once(dtype):
    tiles, masks = tiles_of(dtype)
    pixels = np.concatenate([tile[:, mask] for tile, mask in zip(tiles, masks, strict=True)], 1).astype(np.float64)
    reflectance = pixels * np.array(SCALE)[:, None] + np.array(OFFSET)[:, None]
    result = gathered(dtype, tiles, masks).result([])
    assert result.num_pixels == pixels.shape[1]
    np.testing.assert_allclose(result.mean, reflectance.mean(1), rtol=1e-10)
    np.testing.assert_allclose(result.covariance, np.cov(reflectance, bias=True), rtol=1e-9)
    np.testing.assert_allclose(result.std, reflectance.std(1), rtol=1e-9)
    np.testing.assert_allclose(result.minimum, reflectance.min(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.maximum, reflectance.max(1), rtol=1e-12, atol=1e-12)
    assert set(result.percentiles) == {str(percent) for percent in PERCENTILES}
    for percent in PERCENTILES:
        expected = np.percentile(reflectance, percent, axis=1)
        largest_error = 1e-12 * np.abs(expected) + 1e-12
        if dtype == "float32":  # 0.2 % of the stored value
            largest_error = np.abs(expected - OFFSET) / 512 + 1e-4 * np.abs(SCALE)
        assert (np.abs(result.percentiles[str(percent)] - expected) <= largest_error).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_accumulators_joined_through_files_have_the_same_bits(tmp_path, dtype):
    tiles, masks = tiles_of(dtype)
    results = []
    for through_files in (False, True):
        joined = LeafValues(dtype, SCALE, OFFSET)
        for number, (first, last) in enumerate(pairwise((0, 1, 5, 12))):
            part = gathered(dtype, tiles[first:last], masks[first:last])
            if through_files:
                part.save(tmp_path / f"{number}.npz")
                joined.join_saved(tmp_path / f"{number}.npz")
            else:
                joined.join(part)
        results.append(joined.result([1, 2]).model_dump_json())
    assert results[0] == results[1]
    if dtype != "float32":
        assert results[0] == gathered(dtype, tiles[::-1], masks[::-1]).result([1, 2]).model_dump_json()


def test_products_beyond_64_bits_stay_exact():
    tile = np.full((3, 1024, 1025), 65535, np.uint16)
    values = gathered("uint16", [tile] * 3, [np.ones((1024, 1025), bool)] * 3)
    for _ in range(12):
        values.join(values)
    result = values.result([])
    assert result.num_pixels * 65535**2 > 2**63
    assert result.std == [0, 0, 0]
