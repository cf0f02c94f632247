"""A report: one HTML file that holds its pictures, refers to nothing outside itself, and prints well."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

PICTURE_DPI = 110


@dataclass(frozen=True)
class Cell:
    """A word or number, and what is said below it in small."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells below headings. The first row can be stressed: it is what the report is about."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    stresses_first_row: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a sentence that says what to see, then a picture with the name of its file, or a table."""

    heading: str
    caption: str
    content: Figure | Table
    name: str = ""


def write_report(
    path: Path,
    *,
    title: str,
    verdict: str,
    cautions: Sequence[str],
    sections: Sequence[Section],
    facts: Mapping[str, str],
    facts_heading: str,
) -> None:
    """Write the report, and its pictures into `pictures/` beside it."""
    pictures = path.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    environment = Environment(
        loader=PackageLoader("msvae.report", "."), autoescape=select_autoescape(["j2"]), undefined=StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        verdict=verdict,
        cautions=cautions,
        sections=[(s, _picture(s, pictures) if isinstance(s.content, Figure) else None) for s in sections],
        facts=facts,
        facts_heading=facts_heading,
    )
    path.write_text(page, encoding="utf-8")


def data_uri(png: Path) -> str:
    """A PNG file as a `data:` address."""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def _picture(section: Section, folder: Path) -> str:
    assert isinstance(section.content, Figure)
    png = folder / f"{section.name}.png"
    section.content.savefig(png, dpi=PICTURE_DPI)
    return data_uri(png)
