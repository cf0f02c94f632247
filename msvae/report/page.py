"""A report page: one HTML file that contains its pictures, loads nothing from outside, and prints well."""

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
    """A cell of a table."""

    text: str
    small: str = ""
    """Small print below the text."""

    @classmethod
    def with_interval(cls, value: float | None, ends: Sequence[float | None] | None, form: str) -> Cell:
        """Return a number with the ends of its interval, if they are known, as small print."""
        if value is None:
            return cls("–")
        return cls(form.format(value), " to ".join(map(form.format, ends)) if ends and None not in ends else "")


@dataclass(frozen=True)
class Table:
    """Rows of cells below headings."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    highlight_first_row: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page: heading, caption, and a figure or a table."""

    heading: str
    caption: str
    content: Figure | Table
    file_stem: str = ""
    """Name of the file of a figure, without `.png`."""


def write_page(
    path: Path,
    *,
    title: str,
    summary: str,
    cautions: Sequence[str],
    sections: Sequence[Section],
    facts: Mapping[str, str],
    facts_heading: str,
) -> None:
    """Write the page, and its pictures also as files into the folder `pictures/` next to it.

    Args: file to write; title; text of the first paragraph; warnings below it; sections; names and values of the list
        at the end, and its heading.
    """
    pictures = path.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    environment = Environment(
        loader=PackageLoader("msvae.report", "."), autoescape=select_autoescape(["j2"]), undefined=StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        summary=summary,
        cautions=cautions,
        sections=[(s, _save_picture(s, pictures) if isinstance(s.content, Figure) else None) for s in sections],
        facts=facts,
        facts_heading=facts_heading,
    )
    path.write_text(page, encoding="utf-8")


def data_uri(png: Path) -> str:
    """Return a PNG file as a `data:` URI."""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def _save_picture(section: Section, folder: Path) -> str:
    assert isinstance(section.content, Figure)
    png = folder / f"{section.file_stem}.png"
    section.content.savefig(png, dpi=PICTURE_DPI)
    return data_uri(png)
