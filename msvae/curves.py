"""What a run has logged, as lines to draw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msvae.runs import METRICS, VALIDATION, whole_lines

Line = tuple[list[float], list[float]]
"""Steps and values."""
PANELS = {
    "psnr_db": "validation: leaf PSNR (dB)",
    "angle_deg": "validation: spectral angle (°)",
    "ndvi_mae": "validation: NDVI error",
    "ssim": "validation: SSIM",
}
MOST_POINTS = 200


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of one a line; none where it is not there."""
    return [json.loads(line) for line in whole_lines(path)] if path.is_file() else []


def loss_lines(run: Path) -> dict[str, Line]:
    """`training` and `validation` loss, whichever there are."""
    lines = {
        name: line(rows_of(run / file), "loss") for name, file in (("training", METRICS), ("validation", VALIDATION))
    }
    return {name: drawn for name, drawn in lines.items() if drawn is not None}


def line(rows: Sequence[dict[str, Any]], name: str) -> Line | None:
    """A number over the steps at which it was logged, means of neighbours where there are many; None without any."""
    points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    if not points:
        return None
    size = -(-len(points) // MOST_POINTS)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    steps, values = zip(*((_mean([p[0] for p in b]), _mean([p[1] for p in b])) for b in blocks), strict=True)
    return list(steps), list(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
