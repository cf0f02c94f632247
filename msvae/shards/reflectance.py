"""What can be reflectance: the same limits for rasters that are packed and for tars of others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BRIGHT = 2.0
"""No leaf reflects that much: floats with half their leaf values above are not in reflectance."""
MAX_SCALE = 10.0
"""Reflectance over pi is multiplied by pi; what is larger was meant to divide."""


def check_scale(scales: Sequence[float]) -> None:
    """Raises: ValueError when a factor from value to reflectance is none."""
    for scale in scales:
        if not (math.isfinite(scale) and 0 < scale <= MAX_SCALE):
            divides = math.isfinite(scale) and scale > 0
            hint = f"; give {1 / scale:g} to divide by {scale:g}" if divides else ", such as 0.0001"
            raise ValueError(f"got --scale {scale:g}, expected a number above 0 and at most {MAX_SCALE:g}{hint}")


def check_offset(offsets: Sequence[float]) -> None:
    """Raises: ValueError when the reflectance of the value 0 is none."""
    for offset in offsets:
        if not math.isfinite(offset):
            raise ValueError(f"got --offset {offset:g}, expected a number, such as -0.1")


def usual_scale(dtype: str) -> str:
    """The scale that values of a type most often have, for messages."""
    return "0.01 for percent" if np.dtype(dtype).itemsize == 1 else "0.0001 for reflectance x 10000"


def too_bright(place: object) -> ValueError:
    """For float values of which no scale is known and which cannot be reflectance as they are."""
    return ValueError(
        f"{place} cannot hold reflectance from 0 to 1: the median leaf value is above {BRIGHT:g}; "
        f"give --scale, such as {usual_scale('float32')}, {usual_scale('uint8')}, or 1 if it is right"
    )


def brightness_notice(mean: Sequence[float], dtype: str) -> str | None:
    """What to say of the mean leaf reflectance of each band where one is above 1."""
    if (brightest := max(mean)) <= 1:
        return None
    return (
        f"mean leaf reflectance is {brightest:g}, expected 0 to 1; give another --scale, such as {usual_scale(dtype)}"
    )
