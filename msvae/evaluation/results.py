"""What was found out about a model and its rivals, as `metrics.json` holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msvae.evaluation.measurement import Judged
from msvae.metrics.accumulate import total
from msvae.metrics.aggregate import Numbers, measures, plain
from msvae.metrics.bootstrap import interval, intervals, resample
from msvae.metrics.indices import INDICES

COMPARED = ("psnr_db", "angle_deg", "ndvi_mae")


@dataclass(frozen=True)
class Finding:
    """Of one reconstruction: its numbers, ends of their 95 % intervals, and their values over the resamples.

    Without intervals, empty, where there is a single unit to draw from.
    """

    numbers: dict[str, Any]
    intervals: dict[str, Any]
    resampled: Numbers

    @classmethod
    def of(cls, judged: Judged, extra: Mapping[str, Any] | None = None) -> Finding:
        """Args: more to be known of it.

        Raises: ValueError when the split has no leaf pixel.
        """
        units = judged.of_units()
        totals = total(units)
        counts = {"num_tiles": len(judged.tiles["num_pixels"]), "num_leaf_pixels": int(totals["num_pixels"][0])}
        resampled = measures(resample(units)) if judged.units.num_units > 1 else {}
        ends = {name: _pairs(values) for name, values in intervals(resampled).items()}
        # without the bands for an index its name stays, for whoever reads it
        numbers: dict[str, Any] = dict.fromkeys(f"{index}_mae" for index in INDICES)
        return cls(numbers | plain(measures(totals)) | counts | dict(extra or {}), ends, resampled)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.numbers, "intervals": self.intervals}

    def less(self, other: Finding) -> dict[str, Any]:
        """By how much this one is above another: value and interval, both resampled alike."""
        return {
            name: {
                "value": self.numbers[name] - other.numbers[name],
                "interval": _pairs(interval(self.resampled[name] - other.resampled[name])) if self.resampled else None,
            }
            for name in COMPARED
            if self.numbers.get(name) is not None and other.numbers.get(name) is not None
        }


def write_metrics(path: Path, findings: Mapping[str, Finding], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write `metrics.json`; returns what it holds."""
    rivals = {name: finding for name, finding in findings.items() if name != "model"}
    metrics = {
        "model": findings["model"].plain(),
        "baselines": {name: finding.plain() for name, finding in rivals.items()},
        "differences": {name: findings["model"].less(finding) for name, finding in rivals.items()},
        **about,
    }
    path.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


def _pairs(ends: np.ndarray[Any, np.dtype[np.float64]]) -> list[Any]:
    """(2,) as [low, high]; (2, K) as K of them."""
    if ends.ndim == 2:
        return [_pairs(pair) for pair in ends.T]
    return [float(end) if np.isfinite(end) else None for end in ends]
