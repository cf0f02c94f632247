"""The log files of a run: JSON lines that a resumed run appends to, and the curves that they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"
RUN_CARD = "run_card.json"

Line = tuple[list[float], list[float]]
"""Steps and values."""
PANELS = {
    "psnr_db": "validation: leaf PSNR (dB)",
    "angle_deg": "validation: spectral angle (°)",
    "ndvi_mae": "validation: NDVI error",
    "ssim": "validation: SSIM",
}
MOST_POINTS = 200


class JsonLines:
    """A file of one JSON object a line, each with its `step`; lines after `last_step` are dropped."""

    def __init__(self, path: Path, last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = whole_lines(path) if path.is_file() else []
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= last_step))
        partial.rename(path)
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite, which JSON does not know, become null."""
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def whole_lines(path: Path) -> list[str]:
    """Whole lines; a kill can leave half of the last one."""
    return [line for line in path.read_text().split("\n")[:-1] if line]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
