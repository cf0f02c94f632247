"""Pictures of tiles and their reconstructions: composites, error maps and leaf spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from msvae.bands import Bands

Picture = NDArray[np.float64]
LEAF, RECON = "#1b7f3b", "#d1495b"
MASK_COLOURS = np.array([[0.93, 0.93, 0.93], [0.11, 0.50, 0.23]])
STRETCH_PERCENTILES = (1.0, 99.0)
GAMMA = 0.7
"""Lifts leaves, which are dark in visible light, above black."""


@dataclass(frozen=True)
class Example:
    """One tile: original and reconstruction (C, H, W), reflectance, and its leaf mask (H, W)."""

    key: str
    original: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    leaf_mask: NDArray[np.bool_]

    @classmethod
    def of_tensors(cls, key: str, original: Any, reconstruction: Any, leaf_mask: Any) -> Example:
        """From torch tensors on any device."""
        return cls(key, original.cpu().numpy(), reconstruction.float().cpu().numpy(), leaf_mask.cpu().numpy())

    def rmse(self) -> NDArray[np.float64]:
        """Root mean squared error over bands at each leaf pixel, NaN elsewhere, (H, W)."""
        error = np.sqrt(np.mean(np.square(self.reconstruction - self.original), axis=0, dtype=np.float64))
        return np.where(self.leaf_mask, error, np.nan)


@dataclass(frozen=True)
class Composite:
    """A picture of three bands. True colour shares one stretch over its bands, so that leaves are green."""

    name: str
    channels: tuple[int, int, int]
    shared_stretch: bool

    def draw(self, example: Example, reconstructed: bool) -> Picture:
        """(H, W, 3) in 0..1, stretched by the original alone, so that both sides compare.

        A reconstruction is shown on the leaf alone: nothing was learned of the rest.
        """
        original = np.stack([example.original[channel] for channel in self.channels], axis=-1)
        original = np.where(np.isfinite(original), original, np.nan)
        axis = None if self.shared_stretch else (0, 1)
        low, high = np.nanpercentile(original, STRETCH_PERCENTILES, axis=axis)
        source = example.reconstruction[list(self.channels)].transpose(1, 2, 0) if reconstructed else original
        picture: Picture = np.clip((source - low) / np.maximum(high - low, 1e-6), 0, 1).astype(np.float64) ** GAMMA
        if reconstructed:
            picture[~example.leaf_mask] = 1.0
        return picture


def composites(bands: Bands) -> list[Composite]:
    """The pictures that the bands allow: true colour and colour infrared, else the first bands."""
    found = []
    if bands.has("red", "green", "blue"):
        found.append(Composite("true colour", _indices(bands, ("red", "green", "blue")), shared_stretch=True))
    if bands.has("nir", "red", "green"):
        found.append(Composite("colour infrared", _indices(bands, ("nir", "red", "green")), shared_stretch=False))
    first, second, third = (min(i, len(bands) - 1) for i in range(3))
    return found or [Composite("first bands", (first, second, third), shared_stretch=False)]


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


def _indices(bands: Bands, roles: tuple[str, str, str]) -> tuple[int, int, int]:
    first, second, third = (bands.index(role) for role in roles)
    return first, second, third


def _show(axes: Axes, picture: Picture, title: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    _bare(axes, title)


def _bare(axes: Axes, title: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    axes.spines[:].set_visible(False)
