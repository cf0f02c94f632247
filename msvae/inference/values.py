"""From reflectance to the values of a file, in its type and scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.rasters.layout import Layout

EXACT_INTEGERS = 2**53
"""Up to it a float64 holds every whole number."""


def fill_value(dtype: str, nodata: Any) -> Any:
    """What stands off the leaf: nodata, or where there is none NaN, or 0 where the type has no NaN either."""
    if nodata is not None:
        return nodata
    return np.nan if np.dtype(dtype).kind == "f" else 0


def leaf_values(
    reflectance_CHW: NDArray[np.float32], leaf_HW: NDArray[np.bool_], layout: Layout, nodata: Any
) -> NDArray[Any]:
    """Values (C, H, W) in the type of the file; integers rounded and clipped. On the leaf none is nodata.

    Raises: ValueError when reflectance on the leaf is not finite.
    """
    dtype = np.dtype(layout.source_dtype)
    values_CHW: NDArray[Any]
    scale, offset = (np.array(one_a_band)[:, None, None] for one_a_band in (layout.source_scale, layout.source_offset))
    exact_CHW = (reflectance_CHW.astype(np.float64) - offset) / scale
    if not np.isfinite(exact_CHW[:, leaf_HW]).all():
        raise ValueError("the model gives reflectance that is not finite; train it again, or use another checkpoint")
    if dtype.kind == "f":
        values_CHW = exact_CHW.astype(dtype)
        beside = np.nextafter(dtype.type(nodata), dtype.type(0)) if nodata else np.finfo(dtype).tiny
    else:
        low, high = max(np.iinfo(dtype).min, -EXACT_INTEGERS), min(np.iinfo(dtype).max, EXACT_INTEGERS)
        exact_CHW[~np.isfinite(exact_CHW)] = 0
        values_CHW = np.rint(exact_CHW).clip(low, high).astype(dtype)
        beside = nodata if nodata is None else nodata + 1 if nodata < high else nodata - 1
    if nodata is not None:
        values_CHW[values_CHW == nodata] = beside
    values_CHW[:, ~leaf_HW] = fill_value(layout.source_dtype, nodata)
    return values_CHW
