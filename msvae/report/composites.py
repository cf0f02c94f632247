"""Tiles with their reconstructions, and the pictures of three bands that show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.bands import MIN_INDEX_SUM, Bands

Picture = NDArray[np.float64]
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

    @property
    def images(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Original and reconstruction."""
        return self.original, self.reconstruction

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


def normalised_difference(
    image_CHW: NDArray[np.float32], first: int, second: int, leaf_HW: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """(a - b) / (a + b) on the leaf, NaN elsewhere and where it is noise, (H, W)."""
    a, b = (image_CHW[channel].astype(np.float64).clip(min=0) for channel in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(leaf_HW & (a + b >= MIN_INDEX_SUM), (a - b) / (a + b), np.nan)


def composites(bands: Bands) -> list[Composite]:
    """The pictures that the bands allow: true colour and colour infrared, else the first bands."""
    found = []
    if bands.has("red", "green", "blue"):
        found.append(Composite("true colour", _indices(bands, ("red", "green", "blue")), shared_stretch=True))
    if bands.has("nir", "red", "green"):
        found.append(Composite("colour infrared", _indices(bands, ("nir", "red", "green")), shared_stretch=False))
    first, second, third = (min(i, len(bands) - 1) for i in range(3))
    return found or [Composite("first bands", (first, second, third), shared_stretch=False)]


def _indices(bands: Bands, roles: tuple[str, str, str]) -> tuple[int, int, int]:
    first, second, third = (bands.index(role) for role in roles)
    return first, second, third
