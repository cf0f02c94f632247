"""The model's numbers tile by tile, image by image and group by group, worst first, for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.bands import Bands
from msvae.evaluation.measurement import Judged
from msvae.metrics.aggregate import Sums, measures
from msvae.shards.splits import TileOrigin

Row = dict[str, Any]


def write_tables(out: Path, judged: Judged, origins: Sequence[TileOrigin], bands: Bands) -> dict[str, list[Row]]:
    """Write `images.csv`, `groups.csv` and `tiles.csv`; returns their rows."""
    units = judged.units
    names: dict[str, list[Row]] = {
        "images": _named("image", units.images, units.image_of_tile),
        "groups": _named("group", units.groups, units.group_of_tile),
        "tiles": [
            {"tile": origin.key, "image": origin.image, "group": origin.group, "slot": slot}
            for slot, origin in enumerate(origins)
        ],
    }
    sums = {"images": judged.of_images(), "groups": judged.of_groups(), "tiles": judged.tiles}
    tables = {kind: _rows(names[kind], sums[kind], bands) for kind in names}
    for kind, rows in tables.items():
        _write_csv(out / f"{kind}.csv", rows)
    return tables


def _named(kind: str, names: Sequence[str], number_of_tile: NDArray[np.int64]) -> list[Row]:
    num_tiles = np.bincount(number_of_tile, minlength=len(names))
    return [{kind: name, "tiles": int(number)} for name, number in zip(names, num_tiles, strict=True)]


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _rows(names: Sequence[Row], sums: Sums, bands: Bands) -> list[Row]:
    """Of what has leaf, worst first; None, an empty cell, is not measurable."""
    numbers = measures(sums)
    columns = {name: values for name, values in numbers.items() if values.ndim == 1}
    for name in ("rmse", "bias"):
        per_band = numbers[f"{name}_per_band"].T
        columns |= {f"{name}_{tag}": values for tag, values in zip(bands.tags, per_band, strict=True)}
    for zone, values in zip(("edge", "interior"), numbers["rmse_per_zone"].T, strict=True):
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
