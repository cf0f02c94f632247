"""Leaf by a vegetation index: `ndvi>0.10` and its like, read by a pattern and never evaluated as code."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.bands import Bands

INDEX_ROLES = {"ndvi": ("nir", "red"), "ndre": ("nir", "red_edge"), "gndvi": ("nir", "green")}
"""Each index is the normalised difference of two bands."""

COMPARISONS: dict[str, Callable[[Any, float], Any]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
PATTERN = re.compile(r"\s*([a-z]+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class IndexExpression:
    """A vegetation index compared with a number."""

    index: str
    comparison: str
    threshold: float

    @classmethod
    def parse(cls, text: str) -> IndexExpression:
        """Read `ndvi>0.10`.

        Raises: ValueError for anything but a known index, a comparison and a number.
        """
        match = PATTERN.fullmatch(text)
        if match is None or match[1].lower() not in INDEX_ROLES:
            raise ValueError(
                f"got --mask {text!r}, expected auto or an index ({', '.join(INDEX_ROLES)}) compared by "
                f"{', '.join(COMPARISONS)} with a number, such as 'ndvi>0.10'"
            )
        return cls(match[1].lower(), match[2], float(match[3]))

    def band_indices(self, bands: Bands) -> tuple[int, int]:
        """Positions of the two bands.

        Raises: ValueError when the bands lack one of them.
        """
        first, second = INDEX_ROLES[self.index]
        try:
            return bands.index(first), bands.index(second)
        except ValueError as error:
            raise ValueError(
                f"--mask {self.index} needs {first} and {second}: {error}; choose another index or mask files"
            ) from error

    def leaf(self, first_HW: NDArray[np.float64], second_HW: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Leaf mask (H, W) from the reflectances of the two bands; where their sum is 0 there is no leaf."""
        with np.errstate(divide="ignore", invalid="ignore"):
            index_HW = (first_HW - second_HW) / (first_HW + second_HW)
            leaf_HW: NDArray[np.bool_] = COMPARISONS[self.comparison](index_HW, self.threshold)
        return leaf_HW & np.isfinite(index_HW)
