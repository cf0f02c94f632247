"""Plausibility limits for reflectance, shared by packing of rasters and indexing of existing tars."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BRIGHT = 2.0
"""Limit of the median leaf value. Floats with a higher median are not reflectance, because no leaf is so bright."""
MAX_SCALE = 10.0
"""Limit of a scale. Values in reflectance / pi need the scale pi; a larger number was probably meant as a divisor."""


def check_scale(scales: Sequence[float]) -> None:
    """Check the factors from stored value to reflectance.

    Raises: ValueError if one is not finite, not above 0, or above MAX_SCALE.
    """
    for scale in scales:
        if not (math.isfinite(scale) and 0 < scale <= MAX_SCALE):
            divides = math.isfinite(scale) and scale > 0
            hint = f"; give {1 / scale:g} to divide by {scale:g}" if divides else ", such as 0.0001"
            raise ValueError(f"got --scale {scale:g}, expected a number above 0 and at most {MAX_SCALE:g}{hint}")


def check_offset(offsets: Sequence[float]) -> None:
    """Check the reflectances of the stored value 0.

    Raises: ValueError if one is not finite.
    """
    for offset in offsets:
        if not math.isfinite(offset):
            raise ValueError(f"got --offset {offset:g}, expected a number, such as -0.1")


def usual_scale(dtype: str) -> str:
    """Return the most common scale for values of a type, for messages."""
    return "0.01 for percent" if np.dtype(dtype).itemsize == 1 else "0.0001 for reflectance x 10000"


def too_bright(location: object) -> ValueError:
    """Return the error for float values that have no known scale and cannot be reflectance."""
    return ValueError(
        f"{location} cannot hold reflectance from 0 to 1: the median leaf value is above {BRIGHT:g}; "
        f"give --scale, such as {usual_scale('float32')}, {usual_scale('uint8')}, or 1 if it is right"
    )


def brightness_notice(mean: Sequence[float], dtype: str) -> str | None:
    """Return a notice if the mean leaf reflectance of a band is above 1, else None."""
    if (brightest := max(mean)) <= 1:
        return None
    return (
        f"mean leaf reflectance is {brightest:g}, expected 0 to 1; give another --scale, such as {usual_scale(dtype)}"
    )
