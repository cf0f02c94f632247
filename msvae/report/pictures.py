"""Figures of tiles and their reconstructions: composites, error maps and leaf spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from msvae.bands import Bands
from msvae.report.composites import STRETCH_PERCENTILES, Example, Picture, composites, normalised_difference

LEAF, RECON = "#1b7f3b", "#d1495b"
OUTLINE = "#ffd400"


def comparison_figure(examples: Sequence[Example], bands: Bands) -> Figure:
    """Draw one row per tile: each composite with the leaf outline, its reconstruction, and the error."""
    kinds = composites(bands)
    num_columns = 2 * len(kinds) + 1
    figure, grid = _subplots(examples, num_columns)
    worst = max((float(np.nanpercentile(e.rmse(), 99)) for e in examples if e.leaf_mask.any()), default=1.0)
    for row, (axes, example) in enumerate(zip(grid, examples, strict=True)):
        for i, kind in enumerate(kinds):
            _show(axes[2 * i], kind.draw(example, reconstructed=False), kind.name if row == 0 else "")
            _draw_outline(axes[2 * i], example)
            _show(axes[2 * i + 1], kind.draw(example, reconstructed=True), "reconstructed" if row == 0 else "")
        error = axes[-1].imshow(example.rmse(), cmap="magma", vmin=0, vmax=worst)
        _style(axes[-1], "error (RMSE)" if row == 0 else "")
    figure.colorbar(error, ax=grid[:, -1].tolist(), shrink=0.6, label="reflectance")
    return figure


def index_figure(examples: Sequence[Example], bands: Bands, index: str) -> Figure:
    """Draw one row per tile: a vegetation index of the original and of the reconstruction, and their difference.

    The first two columns share one colour scale over all tiles, computed from the originals.
    """
    figure, grid = _subplots(examples, 3)
    pair = bands.index_pairs()[index]
    maps = [[normalised_difference(image, *pair, e.leaf_mask) for image in e.images] for e in examples]
    originals = np.concatenate([original[np.isfinite(original)] for original, _ in maps])
    low, high = np.percentile(originals, STRETCH_PERCENTILES) if len(originals) else (0.0, 1.0)
    differences = np.concatenate([np.abs(recon - original)[np.isfinite(original)] for original, recon in maps])
    largest = float(np.nanpercentile(differences, 99)) if len(differences) else 1.0
    name = index.upper()
    for row, (axes, (original, recon)) in enumerate(zip(grid, maps, strict=True)):
        values = axes[0].imshow(original, cmap="viridis", vmin=low, vmax=high)
        axes[1].imshow(recon, cmap="viridis", vmin=low, vmax=high)
        difference = axes[2].imshow(recon - original, cmap="RdBu_r", vmin=-largest, vmax=largest)
        for panel, title in zip(axes, (f"{name}, original", f"{name}, reconstructed", "difference"), strict=True):
            _style(panel, title if row == 0 else "")
    figure.colorbar(values, ax=grid[:, 1].tolist(), shrink=0.6)
    figure.colorbar(difference, ax=grid[:, 2].tolist(), shrink=0.6)
    return figure


def spectra_figure(examples: Sequence[Example], bands: Bands) -> Figure:
    """Draw mean and standard deviation of the leaf spectra of all examples, original and reconstruction.

    Leaf pixels whose original is not finite in every band are left out, as in the metrics.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    leaves = [e.leaf_mask & np.isfinite(e.original).all(axis=0) for e in examples]
    originals, recons = zip(*(e.images for e in examples), strict=True)
    for label, colour, images in (("original", LEAF, originals), ("reconstruction", RECON, recons)):
        pixels = np.concatenate([image[:, leaf] for image, leaf in zip(images, leaves, strict=True)], axis=1)
        mean, std = pixels.mean(axis=1), pixels.std(axis=1)
        axes.plot(bands.wavelengths_nm, mean, "o-", color=colour, label=label)
        axes.fill_between(bands.wavelengths_nm, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="wavelength (nm)", ylabel="reflectance", title="leaf spectra: mean and one standard deviation")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _subplots(examples: Sequence[Example], num_columns: int) -> tuple[Figure, NDArray[Any]]:
    figure = Figure(figsize=(2.1 * num_columns + 0.9, 2.1 * len(examples) + 0.3), layout="constrained")
    grid = figure.subplots(len(examples), num_columns, squeeze=False)
    for axes, example in zip(grid[:, 0], examples, strict=True):
        axes.set_ylabel(example.key, fontsize=6)
    return figure, grid


def _draw_outline(axes: Axes, example: Example) -> None:
    """Draw the outline of the leaf mask. The border of the tile is not drawn."""
    if example.leaf_mask.any() and not example.leaf_mask.all():
        axes.contour(example.leaf_mask, levels=[0.5], colors=OUTLINE, linewidths=0.8)


def _show(axes: Axes, picture: Picture, title: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    _style(axes, title)


def _style(axes: Axes, title: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    axes.spines[:].set_visible(False)
