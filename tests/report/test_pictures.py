"""Figures show the same pixels that the metrics use."""

from __future__ import annotations

import numpy as np
import pytest

from msvae.bands import Bands
from msvae.report.composites import Example
from msvae.report.pictures import spectra_figure


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_leaf_spectra_are_computed_from_finite_leaf_pixels(bad):
    rng = np.random.default_rng(0)
    original, recon = rng.uniform(0.1, 0.5, (2, 5, 8, 8)).astype(np.float32)
    leaf = rng.random((8, 8)) < 0.5
    leaf[3, 3], leaf[0, 0] = True, False
    original[2, 3, 3] = original[:, 0, 0] = bad
    used = [(row, col) for row in range(8) for col in range(8) if leaf[row, col] and (row, col) != (3, 3)]
    figure = spectra_figure([Example("a", original, recon, leaf)], Bands())
    for line, image in zip(figure.axes[0].lines, (original, recon), strict=True):
        mean = [np.mean([float(image[band, row, col]) for row, col in used]) for band in range(5)]
        np.testing.assert_allclose(line.get_ydata(), mean, rtol=1e-6)
