"""Figures of how values spread: leaf shares of tiles, and reflectance before and after, band by band."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from msvae.bands import Bands
from msvae.report.composites import Example
from msvae.report.pictures import LEAF

CLOUD_BINS = 80
CLOUD_PERCENTILES = (0.1, 99.9)
MAX_COLUMNS = 3


def coverage_figure(tiles_by_coverage: NDArray[np.int64]) -> Figure:
    """Number of tiles in equal bins of leaf share from 0 to 1."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 1, len(tiles_by_coverage) + 1)
    axes.bar(edges[:-1], tiles_by_coverage, np.diff(edges), align="edge", color=LEAF, edgecolor="white")
    axes.set(xlabel="leaf share of a tile", ylabel="training tiles", xlim=(0, 1))
    axes.set_title(
        f"coverage of the {tiles_by_coverage.sum():,.0f} tiles logged since the last evaluation", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def bands_figure(examples: Sequence[Example], bands: Bands) -> Figure:
    """Reconstructed against original reflectance of all leaf pixels, a panel a band, as densities."""
    num_columns = min(len(bands), MAX_COLUMNS)
    num_rows = -(-len(bands) // num_columns)
    figure = Figure(figsize=(2.5 * num_columns + 0.6, 2.6 * num_rows + 0.2), layout="constrained")
    original = np.concatenate([e.original[:, e.leaf_mask] for e in examples], axis=1)
    recon = np.concatenate([e.reconstruction[:, e.leaf_mask] for e in examples], axis=1)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes, x, y, name, nm in zip(panels, original, recon, bands.names, bands.tags, strict=False):
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        if len(x):
            low, high = np.percentile(np.concatenate([x, y]), CLOUD_PERCENTILES)
            high = max(high, low + 1e-3)
            axes.hist2d(x, y, CLOUD_BINS, [[low, high], [low, high]], cmap="viridis", norm=LogNorm(), rasterized=True)
            axes.plot([low, high], [low, high], color="black", linewidth=0.7)
            rmse = np.sqrt(np.square(y - x, dtype=np.float64).mean())
            axes.text(0.05, 0.92, f"RMSE {rmse:.4f}", transform=axes.transAxes, fontsize=7)
        axes.set_title(nm if name == nm else f"{name.replace('_', ' ')}, {nm}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_aspect("equal", adjustable="box")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(bands) :]:
        axes.set_visible(False)
    figure.supxlabel("original reflectance", fontsize=9)
    figure.supylabel("reconstructed", fontsize=9)
    return figure
