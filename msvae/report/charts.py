"""Charts of distributions of errors, reflectance and leaf coverage, and curves of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from msvae.bands import Bands
from msvae.report.composites import Example
from msvae.report.pictures import LEAF, RECON

Counts = NDArray[np.float64]
SHOWN_SHARE = 0.998
"""Share of the leaf pixels whose error is within the axis."""
DENSITY_BINS = 80
DENSITY_PERCENTILES = (0.1, 99.9)
"""Percentiles of reflectance at the ends of the axes of `bands_figure`."""
MAX_COLUMNS = 3
BAND_COLOURS = {"blue": "#2b6cb0", "green": "#2f9e44", "red": "#c92a2a", "red_edge": "#9c36b5", "nir": "#495057"}


def histograms_figure(
    error_edges: Counts, error_counts: Counts, angle_edges_deg: Counts, angle_counts: Counts, bands: Bands
) -> Figure:
    """Draw the distribution of the error of each band, and the cumulative distribution of the spectral angle.

    Args: edges of the error bins in reflectance, (bins + 1,); counts (C, bins); edges of the angle bins, (bins + 1,);
        counts (bins,).
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    errors, angles = figure.subplots(1, 2)
    colours = band_colours(bands)
    for counts, name, colour in zip(error_counts, band_labels(bands), colours, strict=True):
        if counts.sum():
            errors.stairs(counts / counts.sum() * 100, error_edges, color=colour, label=name, linewidth=1.2)
    ends = _axis_end(np.abs(error_edges[:-1]), error_counts.sum(axis=0))
    errors.set(
        xlabel="error: reconstruction minus original (reflectance)", ylabel="leaf pixels (%)", xlim=(-ends, ends)
    )
    errors.axvline(0, color="black", linewidth=0.6)
    errors.legend(frameon=False, fontsize=7, ncols=1 + len(bands) // 9)
    share = np.concatenate([[0.0], np.cumsum(angle_counts)]) / max(angle_counts.sum(), 1) * 100
    angles.plot(angle_edges_deg, share, color=LEAF)
    median, p95, axis_end = (
        angle_edges_deg[min(int(np.searchsorted(share, percent)), len(share) - 1)] for percent in (50, 95, 99.5)
    )
    for percent, angle in ((50, median), (95, p95)):
        angles.plot([0, angle, angle], [percent, percent, 0], color="black", linewidth=0.6, linestyle=":")
    angles.set(
        xlabel="spectral angle (°)",
        ylabel="leaf pixels with a smaller angle (%)",
        xlim=(0, max(axis_end, 1e-3)),
        ylim=(0, 100),
    )
    _style(errors, angles)
    return figure


def deciles_figure(
    edges: Sequence[float],
    rmse: Sequence[float | None],
    rmse_ends: Sequence[Sequence[float | None]] | None,
    angle_deg: Sequence[float | None],
    angle_ends: Sequence[Sequence[float | None]] | None,
) -> Figure:
    """Draw RMSE and spectral angle by decile of brightness, from dark to bright, with their intervals.

    Args: nine brightness values between the deciles; per decile the metric, and [low, high] of its interval, or None.
    """
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    ticks = [f"≤ {edges[0]:.3f}", *(f"≤ {edge:.3f}" for edge in edges[1:]), f"> {edges[-1]:.3f}"]
    for axes, values, ends, label, colour in (
        (panels[0], rmse, rmse_ends, "RMSE (reflectance)", RECON),
        (panels[1], angle_deg, angle_ends, "spectral angle (°)", LEAF),
    ):
        heights = np.array([np.nan if value is None else value for value in values])
        axes.bar(range(len(heights)), heights, color=colour, alpha=0.75)
        if ends is not None:
            low, high = np.array([[np.nan if end is None else end for end in pair] for pair in ends]).T
            axes.vlines(range(len(heights)), low, high, color="black", linewidth=1)
        axes.set(xlabel="brightness: mean reflectance of the pixel over all bands", ylabel=label)
        axes.set_xticks(range(len(ticks)), ticks, rotation=45, fontsize=7, ha="right", rotation_mode="anchor")
    _style(*panels)
    return figure


def curves_figure(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Draw lines over training steps, one panel per title.

    Args: lines by title and name, each as steps and values. A panel with more than one line has a legend.
    """
    columns = min(MAX_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for i, (name, (steps, values)) in enumerate(lines.items()):
            marker = "o-" if len(steps) <= 40 else "-"
            colour = LEAF if len(lines) == 1 else f"C{i}"
            axes.plot(steps, values, marker, markersize=3, linewidth=1.2, label=name, color=colour)
        axes.set(xlabel="step")
        axes.set_title(title, fontsize=10)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=7)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    _style(*grid[: len(panels)])
    return figure


def coverage_figure(tiles_by_coverage: NDArray[np.int64]) -> Figure:
    """Draw the number of tiles by coverage, the share of leaf pixels of a tile.

    Args: counts in equal bins from 0 to 1, (bins,).
    """
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 1, len(tiles_by_coverage) + 1)
    axes.bar(edges[:-1], tiles_by_coverage, np.diff(edges), align="edge", color=LEAF, edgecolor="white")
    axes.set(xlabel="coverage: share of leaf pixels of a tile", ylabel="training tiles", xlim=(0, 1))
    axes.set_title(
        f"coverage of the {tiles_by_coverage.sum():,.0f} tiles logged since the last evaluation", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def bands_figure(examples: Sequence[Example], bands: Bands) -> Figure:
    """Draw reconstructed against original reflectance of all leaf pixels as a 2-D histogram, one panel per band."""
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
            low, high = np.percentile(np.concatenate([x, y]), DENSITY_PERCENTILES)
            high = max(high, low + 1e-3)
            axes.hist2d(
                x, y, DENSITY_BINS, [[low, high], [low, high]], cmap="viridis", norm=LogNorm(), rasterized=True
            )
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
    figure.supylabel("reconstructed reflectance", fontsize=9)
    return figure


def band_labels(bands: Bands) -> list[str]:
    """Return the name and wavelength of each band, for a legend or table."""
    return [
        tag if name == tag else f"{name.replace('_', ' ')} {nm:.0f} nm"
        for name, nm, tag in zip(bands.names, bands.wavelengths_nm, bands.tags, strict=True)
    ]


def band_colours(bands: Bands) -> list[str]:
    """Return the colour of the line of each band. A band with a role, such as red, has the colour of its role."""
    roles = {bands.index(role): colour for role, colour in BAND_COLOURS.items() if bands.has(role)}
    return [roles.get(i, f"C{i % 10}") for i in range(len(bands))]


def _axis_end(distance: Counts, counts: Counts) -> float:
    """Return the end of a symmetric axis that shows nearly all counted values."""
    order = np.argsort(distance, kind="stable")
    share = np.cumsum(counts[order]) / max(counts.sum(), 1)
    last = min(int(np.searchsorted(share, SHOWN_SHARE)), len(order) - 1)
    return float(max(distance[order[last]], 2e-3))


def _style(*panels: Axes) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
