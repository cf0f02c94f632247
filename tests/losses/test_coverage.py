"""Checks of a leaf mask, and statistics of coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msvae.losses.coverage import check_mask, mask_stats, tile_stats


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16])
def test_masks_of_any_type_are_leaf_above_one_half(dtype):
    sample = torch.zeros(1, 3, 2, 2)
    mask = torch.tensor([[[[0, 1], [1, 0]]]]).to(dtype)
    assert check_mask(mask, sample).tolist() == [[[[False, True], [True, False]]]]
    assert check_mask(None, sample).all()
    if dtype.is_floating_point:
        assert check_mask(mask * 0.5, sample).sum() == 0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 2, 2), r"shape \(1, 2, 2\) .* expected \(1, 1, 2, 2\)"),
        (torch.ones(1, 2, 2, 2), r"shape \(1, 2, 2, 2\) .* expected \(1, 1, 2, 2\) or one plane per band"),
        (torch.ones(1, 1, 3, 2), r"shape \(1, 1, 3, 2\)"),
        (torch.ones(1, 1, 2, 2, device="meta"), "on meta and a sample on cpu"),
        (torch.full((1, 1, 2, 2), math.nan), "mask with NaN"),
    ],
)
def test_a_wrong_mask_is_an_error_that_says_what_was_expected(mask, message):
    with pytest.raises(ValueError, match=message):
        check_mask(mask, torch.zeros(1, 3, 2, 2))


def test_a_mask_that_is_no_tensor_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="mask of type ndarray, expected a tensor"):
        check_mask(np.ones((1, 1, 2, 2), bool), torch.zeros(1, 3, 2, 2))


def test_a_sample_without_a_batch_is_an_error():
    with pytest.raises(ValueError, match=r"sample of shape \(3, 2, 2\), expected \(B, C, H, W\)"):
        check_mask(None, torch.zeros(3, 2, 2))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_coverage_equals_counting_by_hand(leaf_pixels):
    leaf = torch.zeros(len(leaf_pixels), 1, 4, 5, dtype=torch.bool)
    for tile, count in zip(leaf, leaf_pixels, strict=True):
        tile.view(-1)[:count] = True
    stats = {name: value.tolist() for name, value in mask_stats(leaf).items()}
    assert stats["valid_pixels"] == sum(leaf_pixels)
    assert stats["total_pixels"] == 20 * len(leaf_pixels)
    assert stats["coverage"] == pytest.approx(sum(leaf_pixels) / stats["total_pixels"])
    assert stats["tiles"] == len(leaf_pixels)
    assert stats["empty_tiles"] == leaf_pixels.count(0)
    assert stats["min_coverage"] == pytest.approx(min(leaf_pixels) / 20)
    assert stats["max_coverage"] == pytest.approx(max(leaf_pixels) / 20)
    # computed from whole pixels, because a float such as 0.3 is not exactly the edge of its bin
    bins = [min(9, count * 10 // 20) for count in leaf_pixels]
    assert stats["histogram"] == [bins.count(i) for i in range(10)]


def test_a_pixel_that_is_leaf_in_any_band_counts_as_leaf():
    leaf = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    leaf[0, 0, 0, 0] = leaf[0, 2, 1, 1] = True
    assert int(mask_stats(leaf)["valid_pixels"]) == 2


def test_combined_statistics_of_micro_batches_equal_those_of_the_whole_batch():
    leaf = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > torch.linspace(0, 1.2, 6).view(
        6, 1, 1, 1
    )
    whole, parts = mask_stats(leaf), [mask_stats(part) for part in leaf.split([1, 2, 3])]
    for name in ("valid_pixels", "total_pixels", "tiles", "empty_tiles", "histogram"):
        assert torch.equal(sum(part[name] for part in parts), whole[name])
    assert whole["min_coverage"] == min(part["min_coverage"] for part in parts)
    assert whole["max_coverage"] == max(part["max_coverage"] for part in parts)


def test_every_tile_is_in_one_bin_of_the_histogram():
    coverage = torch.from_numpy(np.linspace(0, 1, 1001))
    stats = tile_stats(coverage)
    assert int(stats["empty_tiles"]) == 1
    assert int(stats["histogram"].sum()) == 1001
    assert stats["histogram"].tolist() == [100] * 9 + [101]
