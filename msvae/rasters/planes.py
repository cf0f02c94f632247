"""What every kind of file offers: planes of pixels that are read window by window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PlaneFacts:
    """What a file states about one plane; `name` is empty where there is none."""

    dtype: str
    name: str = ""
    wavelength_nm: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    nodata: float | None = None


@dataclass(frozen=True)
class Georeference:
    """Where an image lies on Earth, in the words of GDAL; empty for one that lies nowhere."""

    profile: Mapping[str, Any] = field(default_factory=dict)
    """Of `crs`, `transform`, `gcps` and `rpcs` those that are known."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """AREA_OR_POINT: what of a pixel the transform means."""


class Planes(Protocol):
    """An open file or several: (plane, row, column)."""

    height: int
    width: int
    reads_whole_rows: bool
    """A window costs as much as the whole of its rows."""
    facts: list[PlaneFacts]

    @property
    def has_mask_band(self) -> bool:
        """Whether a mask that is no plane of its own hides pixels."""

    def close(self) -> None:
        """Close all files."""

    def take_as_data(self, planes: Sequence[int]) -> None:
        """These planes are not transparency, whatever the file calls them."""

    def is_alpha(self, plane: int) -> bool:
        """Whether a plane holds transparency."""

    def read(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[Any]:
        """Values (planes, rows, columns). Raises: ValueError when the file is damaged."""

    def valid(self, planes: Sequence[int], rows: slice, cols: slice) -> NDArray[np.bool_]:
        """Where nothing hides a pixel (rows, columns)."""

    def place(self, row: int, col: int) -> dict[str, Any]:
        """`crs` and `transform` of the window that starts there, if known."""

    def georeference(self) -> Georeference:
        """Where the whole image lies."""
