"""Metrics from sums over tiles, and their bootstrap intervals over resampled images (Efron 1979).

Sums are added in stored order and divided once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.metrics.histograms import ANGLE_EDGES_DEG, quantile
from msvae.metrics.tile_sums import INDICES

PEAK_REFLECTANCE = 1.0
SMALLEST_MSE = 1e-20
"""Smallest mean squared error in a PSNR, so that an exact reconstruction has 200 dB."""
ACTIVE_VARIANCE = 0.01
"""Smallest variance of the posterior mean of an active channel (Burda, Grosse, Salakhutdinov 2016)."""

NUM_RESAMPLES = 2000
ENDS_PERCENT = (2.5, 97.5)
"""Percentiles of the resamples at the ends of an interval."""
SEED = 20_260_101
"""Seed of the resampling."""

Sums = Mapping[str, NDArray[np.float64]]
"""Sums over leaf pixels by name, (R,) or (R, K): one row per tile, image or resample, in stored order."""
Metrics = dict[str, NDArray[np.float64]]
"""Metrics by name, (R,), or (R, K) with one column per band, decile or zone. NaN if a metric cannot be measured."""


@dataclass(frozen=True)
class Summary:
    """Metrics of a reconstructed split over its leaf pixels, in reflectance. None if a metric cannot be measured."""

    psnr_db: float
    """Peak signal-to-noise ratio over all bands, for a peak reflectance of 1."""
    angle_deg: float | None
    """Mean spectral angle."""
    ndvi_mae: float | None
    ndre_mae: float | None
    ssim: float | None
    """Mean over bands and over windows that are fully inside the leaf."""
    rmse_per_band: list[float]
    num_tiles: int
    num_leaf_pixels: int


def summarise(sums: Sums) -> Summary:
    """Return the metrics of all tiles together.

    Raises: ValueError if the split has no leaf pixel.
    """
    totals = total_sums(sums)
    metrics = to_json(compute_metrics(totals))
    return Summary(
        psnr_db=metrics["psnr_db"],
        angle_deg=metrics["angle_deg"],
        ndvi_mae=metrics.get("ndvi_mae"),
        ndre_mae=metrics.get("ndre_mae"),
        ssim=metrics.get("ssim"),
        rmse_per_band=metrics["rmse_per_band"],
        num_tiles=len(sums["num_pixels"]),
        num_leaf_pixels=int(totals["num_pixels"][0]),
    )


def total_sums(sums: Sums) -> Sums:
    """Add all rows to one.

    Raises: ValueError if there is no leaf pixel.
    """
    check_leaf(sums["num_pixels"])
    return {name: column.sum(axis=0, keepdims=True) for name, column in sums.items()}


def check_leaf(num_pixels: NDArray[Any]) -> None:
    """Check that there is a leaf pixel.

    Raises: ValueError if there is none.
    """
    if not num_pixels.any():
        raise ValueError("the split has no leaf pixel, so nothing can be measured; pack it with another --mask")


def sum_by_class(sums: Sums, class_of_row: NDArray[np.int64], num_classes: int) -> dict[str, NDArray[np.float64]]:
    """Add the rows of each class, in their order, to one row per class. A class is an image or a group of images."""
    added = {name: np.zeros((num_classes, *column.shape[1:])) for name, column in sums.items()}
    for name, column in sums.items():
        np.add.at(added[name], class_of_row, column)
    return added


def mean_spectrum_sums(sums_of_images: Sums) -> dict[str, NDArray[np.float64]]:
    """Return the sum that `compute_metrics` needs for `mean_spectrum_rmse`.

    It is the squared error of the mean leaf spectrum of each image, averaged over bands, times the number of leaf
    pixels of the image.
    """
    pixels = sums_of_images["num_pixels"]
    bias_RC = np.nan_to_num(_ratio(sums_of_images["error"], pixels))
    return {"spectrum_squared_error": np.square(bias_RC).mean(axis=1) * pixels}


def compute_metrics(sums: Sums) -> Metrics:
    """Divide each row once and return all metrics for which there are sums.

    `docs/evaluation.md` defines each metric.
    """
    pixels = sums["num_pixels"]
    mse_RC = _ratio(sums["squared_error"], pixels)
    metrics = {
        "psnr_db": psnr_db(mse_RC.mean(axis=1)),
        "rmse": np.sqrt(mse_RC.mean(axis=1)),
        "angle_deg": _ratio(sums["angle_deg"], sums["num_angles"]),
        "rmse_per_band": np.sqrt(mse_RC),
        "psnr_db_per_band": psnr_db(mse_RC),
    }
    if "ssim" in sums:
        ssim_RC = _ratio(sums["ssim"], sums["num_ssim"])
        metrics |= {"ssim": ssim_RC.mean(axis=1), "ssim_per_band": ssim_RC}
    for index in INDICES:
        if f"{index}_error" in sums:
            metrics[f"{index}_mae"] = _ratio(sums[f"{index}_error"], pixels)
        if f"{index}_signed_error" in sums:
            metrics[f"{index}_bias"] = _ratio(sums[f"{index}_signed_error"], pixels)
    if "absolute_error" in sums:
        metrics |= _detail_metrics(sums, pixels)
    if "spectrum_squared_error" in sums:
        metrics["mean_spectrum_rmse"] = np.sqrt(_ratio(sums["spectrum_squared_error"], pixels))
    if "angle_counts" in sums:
        for name, share in (("angle_median_deg", 0.5), ("angle_p95_deg", 0.95)):
            metrics[name] = quantile(sums["angle_counts"], ANGLE_EDGES_DEG, share)
    return metrics


def psnr_db(mse: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the peak signal-to-noise ratio of mean squared errors, for a peak reflectance of 1."""
    decibels: NDArray[np.float64] = 10 * np.log10(PEAK_REFLECTANCE**2 / np.maximum(mse, SMALLEST_MSE))
    return decibels


def to_json(metrics: Metrics, row: int = 0) -> dict[str, Any]:
    """Convert one row to numbers and lists of numbers; NaN becomes None."""
    return {name: _to_json(values[row]) for name, values in metrics.items()}


def latent_statistics(sums: Sums) -> dict[str, Any]:
    """Return the statistics of the latents of a split.

    Returns: `leaf_cells`; `mean_per_channel` and `std_per_channel` of posterior means; mean
        `posterior_std_per_channel`; `kl_per_channel_nats` per cell; and `active_channels`, the number of
        channels whose variance is above `ACTIVE_VARIANCE`.
    """
    joined = {name: column.sum(axis=0) for name, column in sums.items()}
    mean, squared, posterior_std, kl = (
        joined[name] / joined["cells"] for name in ("latent", "latent_squared", "posterior_std", "kl")
    )
    variance = np.maximum(squared - np.square(mean), 0)
    return {
        "leaf_cells": float(joined["cells"]),
        "mean_per_channel": mean.tolist(),
        "std_per_channel": np.sqrt(variance).tolist(),
        "posterior_std_per_channel": posterior_std.tolist(),
        "kl_per_channel_nats": kl.tolist(),
        "active_channels": int((variance > ACTIVE_VARIANCE).sum()),
    }


def resample(sums: Sums) -> dict[str, NDArray[np.float64]]:
    """Return the sums of resamples, one row each. A resample has as many rows as `sums`, sampled with replacement.

    Which rows are sampled depends only on the number of rows. Two reconstructions of the same images are therefore
    resampled alike, and their difference can be resampled too.
    """
    num_units = len(sums["num_pixels"])
    times_sampled = np.random.Generator(np.random.PCG64(SEED)).multinomial(
        num_units, np.full(num_units, 1 / num_units), NUM_RESAMPLES
    )
    return {name: times_sampled.astype(np.float64) @ column for name, column in sums.items()}


def intervals(resampled: Metrics) -> Metrics:
    """Return the ends of the 95 % interval of each metric, (2,) or (2, K). See `interval`."""
    return {name: interval(values) for name, values in resampled.items()}


def interval(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the 2.5th and 97.5th percentile over the resamples; NaN if no resample has a value.

    Args: values of one metric, (R,) or (R, K).
    Returns: (2,) or (2, K).
    """
    measurable = ~np.isnan(values).all(axis=0)
    ends = np.full((2, *values.shape[1:]), np.nan)
    ends[:, measurable] = np.nanpercentile(values[:, measurable], ENDS_PERCENT, axis=0)
    return ends


def _detail_metrics(sums: Sums, pixels: NDArray[np.float64]) -> Metrics:
    mae_RC = _ratio(sums["absolute_error"], pixels)
    metrics = {
        "mae": mae_RC.mean(axis=1),
        "mae_per_band": mae_RC,
        "bias_per_band": _ratio(sums["error"], pixels),
        "sid": _ratio(sums["sid"], sums["num_angles"]),
    }
    for kind in ("decile", "zone"):
        metrics[f"angle_deg_per_{kind}"] = _ratio(sums[f"{kind}_angle_deg"], sums[f"{kind}_angles"])
        metrics[f"rmse_per_{kind}"] = np.sqrt(_ratio(sums[f"{kind}_squared_error"], sums[f"{kind}_pixels"]))
    return metrics


def _ratio(totals: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    divisor = counts[:, None] if totals.ndim > counts.ndim else counts
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: NDArray[np.float64] = np.where(divisor > 0, totals / divisor, np.nan)
    return ratio


def _to_json(value: Any) -> Any:
    if np.ndim(value):
        return [_to_json(part) for part in value]
    return float(value) if np.isfinite(value) else None
