"""Figures of tiles and their reconstructions: composites, error maps and leaf spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msvae.bands import Bands
from msvae.report.composites import Example, Picture, composites

LEAF, RECON = "#1b7f3b", "#d1495b"
MASK_COLOURS = np.array([[0.93, 0.93, 0.93], [0.11, 0.50, 0.23]])


def comparison_figure(examples: Sequence[Example], bands: Bands) -> Figure:
    """A row a tile: its leaf mask, each composite and its reconstruction, and the error."""
    kinds = composites(bands)
    num_columns = 2 * len(kinds) + 2
    figure = Figure(figsize=(2.1 * num_columns + 0.9, 2.1 * len(examples) + 0.3), layout="constrained")
    grid = figure.subplots(len(examples), num_columns, squeeze=False)
    worst = max((float(np.nanpercentile(e.rmse(), 99)) for e in examples if e.leaf_mask.any()), default=1.0)
    for row, (axes, example) in enumerate(zip(grid, examples, strict=True)):
        _show(axes[0], MASK_COLOURS[example.leaf_mask.astype(int)], "leaf mask" if row == 0 else "")
        for i, kind in enumerate(kinds):
            _show(axes[2 * i + 1], kind.draw(example, reconstructed=False), kind.name if row == 0 else "")
            _show(axes[2 * i + 2], kind.draw(example, reconstructed=True), "reconstructed" if row == 0 else "")
        error = axes[-1].imshow(example.rmse(), cmap="magma", vmin=0, vmax=worst)
        _bare(axes[-1], "error (RMSE)" if row == 0 else "")
        axes[0].set_ylabel(example.key, fontsize=6)
    figure.colorbar(error, ax=grid[:, -1].tolist(), shrink=0.6, label="reflectance")
    return figure


def spectra_figure(examples: Sequence[Example], bands: Bands) -> Figure:
    """Mean and spread of leaf spectra, original against reconstruction, over all examples."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, colour, spectra in (
        ("original", LEAF, [e.original[:, e.leaf_mask] for e in examples]),
        ("reconstruction", RECON, [e.reconstruction[:, e.leaf_mask] for e in examples]),
    ):
        pixels = np.concatenate(spectra, axis=1)
        mean, std = pixels.mean(axis=1), pixels.std(axis=1)
        axes.plot(bands.wavelengths_nm, mean, "o-", color=colour, label=label)
        axes.fill_between(bands.wavelengths_nm, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="wavelength (nm)", ylabel="reflectance", title="leaf spectra: mean and one standard deviation")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves_figure(steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Figure:
    """Numbers of a run over its steps, one panel each."""
    figure = Figure(figsize=(3.4 * len(curves), 2.8), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(steps, values, "o-", color=LEAF, markersize=3)
        axes.set(xlabel="step", title=name)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _show(axes: Axes, picture: Picture, title: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    _bare(axes, title)


def _bare(axes: Axes, title: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    axes.spines[:].set_visible(False)
