"""Bootstrap confidence intervals: metrics of images that are resampled with replacement (Efron 1979)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from msvae.metrics.aggregate import Metrics, Sums

NUM_RESAMPLES = 2000
ENDS_PERCENT = (2.5, 97.5)
SEED = 20_260_101


def resample(sums: Sums) -> dict[str, NDArray[np.float64]]:
    """Return the sums of resamples, one row each. A resample has as many rows as `sums`, sampled with replacement.

    Which rows are sampled depends only on the number of rows. Two reconstructions of the same images are therefore
    resampled alike, and their difference can be resampled too.
    """
    num_units = len(sums["num_pixels"])
    times_sampled = np.random.Generator(np.random.PCG64(SEED)).multinomial(
        num_units, np.full(num_units, 1 / num_units), NUM_RESAMPLES
    )
    return {name: times_sampled.astype(np.float64) @ column for name, column in sums.items()}


def intervals(resampled: Metrics) -> Metrics:
    """Return the ends of the 95 % interval of each metric, (2,) or (2, K). See `interval`."""
    return {name: interval(values) for name, values in resampled.items()}


def interval(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the 2.5th and 97.5th percentile over the resamples; NaN if no resample has a value.

    Args: values of one metric, (R,) or (R, K).
    Returns: (2,) or (2, K).
    """
    measurable = ~np.isnan(values).all(axis=0)
    ends = np.full((2, *values.shape[1:]), np.nan)
    ends[:, measurable] = np.nanpercentile(values[:, measurable], ENDS_PERCENT, axis=0)
    return ends
