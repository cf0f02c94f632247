"""The report of an evaluation: one HTML file that holds its pictures and prints well."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

PICTURE_DPI = 110


@dataclass(frozen=True)
class Section:
    """A heading, a sentence that says what to see, and a picture with the name of its file."""

    heading: str
    caption: str
    figure: Figure
    name: str


@dataclass(frozen=True)
class Row:
    """One reconstruction in the table; numbers as in `metrics.json`."""

    name: str
    explanation: str
    numbers: Mapping[str, Any]


COLUMNS = (
    ("psnr_db", "PSNR (dB) ↑", "{:.2f}"),
    ("angle_deg", "angle (°) ↓", "{:.2f}"),
    ("ndvi_mae", "NDVI error ↓", "{:.4f}"),
    ("ndre_mae", "NDRE error ↓", "{:.4f}"),
    ("ssim", "SSIM ↑", "{:.3f}"),
)


def write_report(
    path: Path,
    *,
    title: str,
    verdict: str,
    rows: Sequence[Row],
    band_labels: Sequence[str],
    sections: Sequence[Section],
    facts: Mapping[str, str],
) -> None:
    """Write the report, which refers to nothing outside itself, and its pictures into `pictures/` beside it."""
    pictures = path.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    for section in sections:
        section.figure.savefig(pictures / f"{section.name}.png", dpi=PICTURE_DPI)
    environment = Environment(
        loader=PackageLoader("msvae.report", "."), autoescape=select_autoescape(["j2"]), undefined=StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        verdict=verdict,
        headings=[heading for _, heading, _ in COLUMNS] + [f"RMSE {label} ↓" for label in band_labels],
        rows=[(row.name, row.explanation, _cells(row.numbers)) for row in rows],
        sections=[(s.heading, s.caption, data_uri(pictures / f"{s.name}.png")) for s in sections],
        facts=facts,
    )
    path.write_text(page)


def data_uri(png: Path) -> str:
    """A PNG file as a `data:` address."""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def _cells(numbers: Mapping[str, Any]) -> list[str]:
    cells = ["–" if numbers[name] is None else form.format(numbers[name]) for name, _, form in COLUMNS]
    return cells + [f"{rmse:.4f}" for rmse in numbers["rmse_per_band"]]
