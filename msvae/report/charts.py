"""Figures of errors: how they spread over pixels, and where on leaves they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from msvae.bands import Bands
from msvae.report.pictures import LEAF, RECON

Counts = NDArray[np.float64]
SHOWN_SHARE = 0.998
"""Of the pixels; the rest lies beyond the ends of an axis."""
BAND_COLOURS = {"blue": "#2b6cb0", "green": "#2f9e44", "red": "#c92a2a", "red_edge": "#9c36b5", "nir": "#495057"}


def histograms_figure(
    error_edges: Counts, error_counts: Counts, angle_edges_deg: Counts, angle_counts: Counts, bands: Bands
) -> Figure:
    """Signed error of each band, and share of leaf pixels below each spectral angle."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    errors, angles = figure.subplots(1, 2)
    colours = colours_of(bands)
    for counts, name, colour in zip(error_counts, labels_of(bands), colours, strict=True):
        if counts.sum():
            errors.stairs(counts / counts.sum() * 100, error_edges, color=colour, label=name, linewidth=1.2)
    ends = _shown(np.abs(error_edges[:-1]), error_counts.sum(axis=0))
    errors.set(xlabel="reconstruction less original (reflectance)", ylabel="leaf pixels (%)", xlim=(-ends, ends))
    errors.axvline(0, color="black", linewidth=0.6)
    errors.legend(frameon=False, fontsize=7, ncols=1 + len(bands) // 9)
    share = np.concatenate([[0.0], np.cumsum(angle_counts)]) / max(angle_counts.sum(), 1) * 100
    angles.plot(angle_edges_deg, share, color=LEAF)
    median, p95, furthest = (
        angle_edges_deg[min(int(np.searchsorted(share, percent)), len(share) - 1)] for percent in (50, 95, 99.5)
    )
    for percent, angle in ((50, median), (95, p95)):
        angles.plot([0, angle, angle], [percent, percent, 0], color="black", linewidth=0.6, linestyle=":")
    angles.set(
        xlabel="spectral angle (°)", ylabel="leaf pixels below (%)", xlim=(0, max(furthest, 1e-3)), ylim=(0, 100)
    )
    _bare(errors, angles)
    return figure


def deciles_figure(
    edges: Sequence[float],
    rmse: Sequence[float | None],
    rmse_ends: Sequence[Sequence[float | None]] | None,
    angle_deg: Sequence[float | None],
    angle_ends: Sequence[Sequence[float | None]] | None,
) -> Figure:
    """RMSE and spectral angle by decile of brightness, dark to bright, with their intervals."""
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
        axes.set(xlabel="brightness of the pixel: mean reflectance of its bands", ylabel=label)
        axes.set_xticks(range(len(ticks)), ticks, rotation=45, fontsize=7, ha="right", rotation_mode="anchor")
    _bare(*panels)
    return figure


def curves_figure(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Panels by title, each with lines by name: steps and values. A legend where there is more than one line."""
    columns = min(3, len(panels))
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
    _bare(*grid[: len(panels)])
    return figure


def labels_of(bands: Bands) -> list[str]:
    """Each band for a legend or table: its name and wavelength."""
    return [
        tag if name == tag else f"{name.replace('_', ' ')} {nm:.0f} nm"
        for name, nm, tag in zip(bands.names, bands.wavelengths_nm, bands.tags, strict=True)
    ]


def colours_of(bands: Bands) -> list[str]:
    """Of lines, one a band: that of its part of the spectrum where each has one alone."""
    roles = {bands.index(role): colour for role, colour in BAND_COLOURS.items() if bands.has(role)}
    return [roles.get(i, f"C{i % 10}") for i in range(len(bands))]


def _shown(distance: Counts, counts: Counts) -> float:
    """How far from 0 an axis must go to show nearly all."""
    order = np.argsort(distance, kind="stable")
    share = np.cumsum(counts[order]) / max(counts.sum(), 1)
    last = min(int(np.searchsorted(share, SHOWN_SHARE)), len(order) - 1)
    return float(max(distance[order[last]], 2e-3))


def _bare(*panels: Axes) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
