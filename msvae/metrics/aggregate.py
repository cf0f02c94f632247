"""From sums to numbers: what a report says of any set of leaf pixels, a split, an image or a resample of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.metrics.histograms import ANGLE_EDGES_DEG, quantile
from msvae.metrics.indices import INDICES

PEAK_REFLECTANCE = 1.0
SMALLEST_MSE = 1e-20
"""An exact reconstruction is reported as 200 dB."""

Sums = Mapping[str, NDArray[np.float64]]
"""What was summed over leaf pixels, (R,) or (R, K) each: a row a set of pixels."""
Numbers = dict[str, NDArray[np.float64]]
"""(R,) each, or (R, K) with an entry a band, decile or zone. NaN: not measurable."""


def measures(sums: Sums) -> Numbers:
    """Divide once, row by row, whatever sums there are; `docs/evaluation.md` defines each number."""
    pixels = sums["num_pixels"]
    mse_RC = _ratio(sums["squared_error"], pixels)
    found = {
        "psnr_db": psnr_db(mse_RC.mean(axis=1)),
        "rmse": np.sqrt(mse_RC.mean(axis=1)),
        "angle_deg": _ratio(sums["angle_deg"], sums["num_angles"]),
        "rmse_per_band": np.sqrt(mse_RC),
        "psnr_db_per_band": psnr_db(mse_RC),
    }
    if "ssim" in sums:
        ssim_RC = _ratio(sums["ssim"], sums["num_ssim"])
        found |= {"ssim": ssim_RC.mean(axis=1), "ssim_per_band": ssim_RC}
    for index in INDICES:
        if f"{index}_error" in sums:
            found[f"{index}_mae"] = _ratio(sums[f"{index}_error"], pixels)
        if f"{index}_signed_error" in sums:
            found[f"{index}_bias"] = _ratio(sums[f"{index}_signed_error"], pixels)
    if "absolute_error" in sums:
        found |= _details(sums, pixels)
    if "spectrum_squared_error" in sums:
        found["mean_spectrum_rmse"] = np.sqrt(_ratio(sums["spectrum_squared_error"], pixels))
    if "angle_counts" in sums:
        for name, share in (("angle_median_deg", 0.5), ("angle_p95_deg", 0.95)):
            found[name] = quantile(sums["angle_counts"], ANGLE_EDGES_DEG, share)
    return found


def psnr_db(mse: NDArray[np.float64]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio against a reflectance of 1."""
    decibels: NDArray[np.float64] = 10 * np.log10(PEAK_REFLECTANCE**2 / np.maximum(mse, SMALLEST_MSE))
    return decibels


def spectrum_sums(sums: Sums) -> dict[str, NDArray[np.float64]]:
    """Of images as rows: the squared error of each one's mean leaf spectrum, mean over bands, times its pixels."""
    pixels = sums["num_pixels"]
    bias_RC = np.nan_to_num(_ratio(sums["error"], pixels))
    return {"spectrum_squared_error": np.square(bias_RC).mean(axis=1) * pixels}


def plain(numbers: Numbers, row: int = 0) -> dict[str, Any]:
    """One row as JSON has it: numbers and lists of numbers, None where there is none."""
    return {name: _plain(values[row]) for name, values in numbers.items()}


def _details(sums: Sums, pixels: NDArray[np.float64]) -> Numbers:
    mae_RC = _ratio(sums["absolute_error"], pixels)
    found = {
        "mae": mae_RC.mean(axis=1),
        "mae_per_band": mae_RC,
        "bias_per_band": _ratio(sums["error"], pixels),
        "sid": _ratio(sums["sid"], sums["num_angles"]),
    }
    for kind in ("decile", "zone"):
        found[f"angle_deg_per_{kind}"] = _ratio(sums[f"{kind}_angle_deg"], sums[f"{kind}_angles"])
        found[f"rmse_per_{kind}"] = np.sqrt(_ratio(sums[f"{kind}_squared_error"], sums[f"{kind}_pixels"]))
    return found


def _ratio(totals: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    divisor = counts[:, None] if totals.ndim > counts.ndim else counts
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: NDArray[np.float64] = np.where(divisor > 0, totals / divisor, np.nan)
    return ratio


def _plain(value: Any) -> Any:
    if np.ndim(value):
        return [_plain(part) for part in value]
    return float(value) if np.isfinite(value) else None
