"""How sure a number is: what it would have been on other images, drawn from those there are (Efron 1979)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from msvae.metrics.aggregate import Numbers, Sums

NUM_RESAMPLES = 2000
ENDS_PERCENT = (2.5, 97.5)
SEED = 20_260_101


def resample(sums: Sums) -> dict[str, NDArray[np.float64]]:
    """Sums of resamples, a row each: as many rows of `sums`, one an image, as there are, drawn with replacement.

    The draws depend on the number of images alone, so that two reconstructions of them are resampled alike and their
    difference can be, too.
    """
    num_units = len(sums["num_pixels"])
    draws = np.random.Generator(np.random.PCG64(SEED)).multinomial(
        num_units, np.full(num_units, 1 / num_units), NUM_RESAMPLES
    )
    return {name: draws.astype(np.float64) @ column for name, column in sums.items()}


def intervals(resampled: Numbers) -> Numbers:
    """Ends of the 95 % interval of each number, (2,) or (2, K): percentiles of its values over the resamples.

    NaN where no resample has a value.
    """
    return {name: interval(values) for name, values in resampled.items()}


def interval(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """As `intervals`, of one number, (R,) or (R, K)."""
    measurable = ~np.isnan(values).all(axis=0)
    ends = np.full((2, *values.shape[1:]), np.nan)
    ends[:, measurable] = np.nanpercentile(values[:, measurable], ENDS_PERCENT, axis=0)
    return ends
