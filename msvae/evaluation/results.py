"""Results of an evaluation as files: `metrics.json` with intervals, and CSV tables of images, groups and tiles."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.bands import Bands
from msvae.evaluation.measurement import Measurement
from msvae.metrics.aggregate import Metrics, Sums, compute_metrics, interval, intervals, resample, to_json, total_sums
from msvae.metrics.tile_sums import INDICES
from msvae.shards.splits import TileOrigin

COMPARED = ("psnr_db", "angle_deg", "ndvi_mae")
"""Metrics whose difference between the model and a baseline is reported."""

Row = dict[str, Any]
"""Row of a table: values by column name."""


@dataclass(frozen=True)
class Result:
    """Metrics of one reconstruction."""

    metrics: dict[str, Any]
    intervals: dict[str, Any]
    """Ends of the 95 % interval of each metric; empty if there is only one unit to resample."""
    resampled: Metrics
    """Values of each metric over the resamples; empty if there is only one unit to resample."""

    @classmethod
    def from_measurement(cls, measurement: Measurement, more: Mapping[str, Any]) -> Result:
        """Compute metrics and intervals.

        Args: `more` holds further entries for `metrics.json`.
        Raises: ValueError if the split has no leaf pixel.
        """
        rows = measurement.resampling_sums()
        totals = total_sums(rows)
        counts = {"num_tiles": len(measurement.tiles["num_pixels"]), "num_leaf_pixels": int(totals["num_pixels"][0])}
        resampled = compute_metrics(resample(rows)) if measurement.units.num_rows > 1 else {}
        ends = {name: _pairs(values) for name, values in intervals(resampled).items()}
        # all indices have a key, also those that cannot be computed from the bands
        metrics: dict[str, Any] = dict.fromkeys(f"{index}_mae" for index in INDICES)
        return cls(metrics | to_json(compute_metrics(totals)) | counts | dict(more), ends, resampled)

    def to_json(self) -> dict[str, Any]:
        """Return the metrics with their intervals."""
        return {**self.metrics, "intervals": self.intervals}

    def minus(self, other: Result) -> dict[str, Any]:
        """Return the differences to another result. They have intervals, because both were resampled alike."""
        return {
            name: {
                "value": self.metrics[name] - other.metrics[name],
                "interval": _pairs(interval(self.resampled[name] - other.resampled[name])) if self.resampled else None,
            }
            for name in COMPARED
            if self.metrics.get(name) is not None and other.metrics.get(name) is not None
        }


def write_metrics(path: Path, results: Mapping[str, Result], more: Mapping[str, Any]) -> dict[str, Any]:
    """Write `metrics.json` and return its content.

    Args: results of `model` and of the baselines by name; further entries of the file.
    """
    baselines = {name: result for name, result in results.items() if name != "model"}
    metrics = {
        "model": results["model"].to_json(),
        "baselines": {name: result.to_json() for name, result in baselines.items()},
        "differences": {name: results["model"].minus(result) for name, result in baselines.items()},
        **more,
    }
    path.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


def write_tables(
    out: Path, measurement: Measurement, origins: Sequence[TileOrigin], bands: Bands
) -> dict[str, list[Row]]:
    """Write `images.csv`, `groups.csv` and `tiles.csv`, largest RMSE first, and return their rows by kind."""
    units = measurement.units
    names: dict[str, list[Row]] = {
        "images": _name_rows("image", units.images, units.image_of_tile),
        "groups": _name_rows("group", units.groups, units.group_of_tile),
        "tiles": [
            {"tile": origin.key, "image": origin.image, "group": origin.group, "slot": slot}
            for slot, origin in enumerate(origins)
        ],
    }
    sums = {"images": measurement.image_sums(), "groups": measurement.group_sums(), "tiles": measurement.tiles}
    tables = {kind: _table_rows(names[kind], sums[kind], bands) for kind in names}
    for kind, rows in tables.items():
        _write_csv(out / f"{kind}.csv", rows)
    return tables


def _name_rows(kind: str, names: Sequence[str], class_of_tile: NDArray[np.int64]) -> list[Row]:
    num_tiles = np.bincount(class_of_tile, minlength=len(names))
    return [{kind: name, "tiles": int(number)} for name, number in zip(names, num_tiles, strict=True)]


def _table_rows(names: Sequence[Row], sums: Sums, bands: Bands) -> list[Row]:
    """Return the rows that have leaf pixels, largest RMSE first. A value that cannot be measured is None."""
    metrics = compute_metrics(sums)
    columns = {name: values for name, values in metrics.items() if values.ndim == 1}
    for name in ("rmse", "bias"):
        per_band = metrics[f"{name}_per_band"].T
        columns |= {f"{name}_{tag}": values for tag, values in zip(bands.tags, per_band, strict=True)}
    for zone, values in zip(("edge", "interior"), metrics["rmse_per_zone"].T, strict=True):
        columns[f"rmse_{zone}"] = values
    pixels = sums["num_pixels"]
    worst_first = np.argsort(-np.where(pixels > 0, columns["rmse"], -1), kind="stable")
    return [
        names[row]
        | {"leaf_pixels": int(pixels[row])}
        | {name: None if np.isnan(values[row]) else float(values[row]) for name, values in columns.items()}
        for row in worst_first
        if pixels[row]
    ]


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _pairs(ends: NDArray[np.float64]) -> list[Any]:
    """Convert (2,) to [low, high], and (2, K) to K such pairs."""
    if ends.ndim == 2:
        return [_pairs(pair) for pair in ends.T]
    return [float(end) if np.isfinite(end) else None for end in ends]
