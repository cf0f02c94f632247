"""Log files of a run: JSON lines that a resumed run continues, the curves in them, and versions of libraries."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msvae.files import remove_abandoned, write_text

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"
RUN_CARD = "run_card.json"
LIBRARIES = ("msvae", "torch", "diffusers", "accelerate", "deepspeed", "numpy", "rasterio")
"""Libraries whose versions a run stores."""

Curve = tuple[list[float], list[float]]
"""Steps and values of a curve."""
PANELS = {
    "psnr_db": "validation: leaf PSNR (dB)",
    "angle_deg": "validation: spectral angle (°)",
    "ndvi_mae": "validation: NDVI error",
    "ssim": "validation: SSIM",
}
"""Titles of the validation curves in reports, by the names of their values in the log."""
MAX_POINTS = 200
"""Number of points of a curve. Neighbouring values are averaged if there are more."""


class JsonLines:
    """A file with one JSON object per line, each with its `step`. Opening it drops the lines after `last_step`."""

    def __init__(self, path: Path, last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        lines = complete_lines(path) if path.is_file() else []
        write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= last_step))
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append an object. Numbers that are not finite become null, because JSON has none."""
        self._file.write(json.dumps(_replace_nonfinite(row), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def complete_lines(path: Path) -> list[str]:
    """Return the complete lines of a file. A killed run may have written only a part of the last line."""
    return [line for line in path.read_text().split("\n")[:-1] if line]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines, or an empty list if the file does not exist."""
    return [json.loads(line) for line in complete_lines(path)] if path.is_file() else []


def loss_curves(run: Path) -> dict[str, Curve]:
    """Return the curves of the `training` and the `validation` loss, without those that have no values."""
    files = {"training": METRICS, "validation": VALIDATION}
    curves = {name: curve(rows_of(run / file), "loss") for name, file in files.items()}
    return {name: found for name, found in curves.items() if found is not None}


def curve(rows: Sequence[dict[str, Any]], name: str) -> Curve | None:
    """Return the curve of a value in the log, with at most `MAX_POINTS` points, or None if it has no values."""
    points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    if not points:
        return None
    size = -(-len(points) // MAX_POINTS)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    steps, values = zip(*((_mean([p[0] for p in b]), _mean([p[1] for p in b])) for b in blocks), strict=True)
    return list(steps), list(values)


def library_versions() -> dict[str, str]:
    """Return the version of Python and of every library in `LIBRARIES`, or `not installed`."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _replace_nonfinite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
