"""Bootstrap intervals of metrics."""

from __future__ import annotations

import numpy as np
import pytest

from msvae.metrics.aggregate import NUM_RESAMPLES, compute_metrics, interval, intervals, resample


def images(squared_errors: np.ndarray, pixels: float = 100.0) -> dict[str, np.ndarray]:
    """Return sums of images with one band and the given mean squared errors."""
    num = len(squared_errors)
    return {
        "num_pixels": np.full(num, pixels),
        "squared_error": (squared_errors * pixels)[:, None],
        "angle_deg": np.full(num, 200.0),
        "num_angles": np.full(num, 100.0),
    }


def test_identical_images_have_an_interval_of_width_zero():
    ends = intervals(compute_metrics(resample(images(np.full(7, 0.01)))))
    assert ends["rmse"] == pytest.approx([0.1, 0.1])
    assert ends["psnr_db"] == pytest.approx([20, 20])
    assert ends["angle_deg"].tolist() == [2, 2]


def test_two_images_have_three_distinct_resamples():
    found = compute_metrics(resample(images(np.array([0.01, 0.04]))))["rmse"]
    ways, times = np.unique(found.round(9), return_counts=True)
    assert ways == pytest.approx([0.1, np.sqrt(0.025), 0.2])
    assert times / NUM_RESAMPLES == pytest.approx([0.25, 0.5, 0.25], abs=0.04)


def test_resamples_are_the_same_every_time_and_for_every_reconstruction():
    good, bad = images(np.linspace(0.01, 0.02, 9)), images(np.linspace(0.02, 0.04, 9))
    first, again = (compute_metrics(resample(good))["rmse"] for _ in range(2))
    assert np.array_equal(first, again)
    # every image has twice the squared error: the ratio is certain, however much the images differ
    ratio = compute_metrics(resample(bad))["rmse"] / first
    assert interval(ratio) == pytest.approx([np.sqrt(2)] * 2)


def test_images_are_weighted_by_their_leaf_pixels():
    sums = images(np.array([0.01, 0.04]))
    sums["num_pixels"] = np.array([300.0, 100.0])
    sums["squared_error"] = np.array([[3.0], [4.0]])
    found = compute_metrics(resample(sums))["rmse"]
    assert np.unique(found.round(9)) == pytest.approx([0.1, np.sqrt(7 / 400), 0.2])


def test_interval_contains_the_true_value_in_95_percent_of_the_cases():
    generator = np.random.default_rng(5)
    truth, held, repeats, num_images = 1.0, 0, 300, 60
    for _ in range(repeats):
        means = generator.normal(truth, 0.2, num_images)
        low, high = interval(resample({"num_pixels": np.ones(num_images), "value": means})["value"] / num_images)
        held += low <= truth <= high
    assert 0.91 <= held / repeats <= 0.98


def test_a_metric_without_a_value_in_any_resample_has_no_interval():
    assert np.isnan(interval(np.full((50, 2), np.nan))).all()
    half = np.where(np.arange(50) % 2, 1.0, np.nan)
    assert interval(half).tolist() == [1, 1]
