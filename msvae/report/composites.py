"""Tiles with their reconstructions, and composites: pictures of three bands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.bands import MIN_INDEX_SUM, Bands

Picture = NDArray[np.float64]
STRETCH_PERCENTILES = (1.0, 99.0)
GAMMA = 0.7
"""Exponent of the display. It makes leaves, which are dark in visible light, brighter."""


@dataclass(frozen=True)
class Example:
    """A tile and its reconstruction."""

    key: str
    original: NDArray[np.float32]
    """Reflectance (C, H, W)."""
    reconstruction: NDArray[np.float32]
    """Reflectance (C, H, W)."""
    leaf_mask: NDArray[np.bool_]
    """Leaf mask (H, W)."""

    @classmethod
    def from_tensors(cls, key: str, original: Any, reconstruction: Any, leaf_mask: Any) -> Example:
        """Convert torch tensors on any device."""
        return cls(key, original.cpu().numpy(), reconstruction.float().cpu().numpy(), leaf_mask.cpu().numpy())

    @property
    def images(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Original and reconstruction, (C, H, W) each."""
        return self.original, self.reconstruction

    def rmse(self) -> NDArray[np.float64]:
        """Return the root mean squared error over bands of each leaf pixel, (H, W), NaN elsewhere."""
        error = np.sqrt(np.mean(np.square(self.reconstruction - self.original), axis=0, dtype=np.float64))
        return np.where(self.leaf_mask, error, np.nan)


@dataclass(frozen=True)
class Composite:
    """A picture of three bands."""

    name: str
    band_indices: tuple[int, int, int]
    """Indices of the bands for red, green and blue."""
    shared_stretch: bool
    """True if the three bands share one stretch, as in true colour, where leaves must look green."""

    def draw(self, example: Example, reconstructed: bool) -> Picture:
        """Return the picture, (H, W, 3) from 0 to 1.

        The original alone sets the stretch, so that original and reconstruction can be compared. A reconstruction is
        shown inside the leaf mask only, because the model is not trained on the background.
        """
        original = np.stack([example.original[band] for band in self.band_indices], axis=-1)
        original = np.where(np.isfinite(original), original, np.nan)
        axis = None if self.shared_stretch else (0, 1)
        low, high = np.nanpercentile(original, STRETCH_PERCENTILES, axis=axis)
        source = example.reconstruction[list(self.band_indices)].transpose(1, 2, 0) if reconstructed else original
        picture: Picture = np.clip((source - low) / np.maximum(high - low, 1e-6), 0, 1).astype(np.float64) ** GAMMA
        if reconstructed:
            picture[~example.leaf_mask] = 1.0
        return picture


def normalised_difference(
    image_CHW: NDArray[np.float32], first: int, second: int, leaf_HW: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return (a - b) / (a + b) of two bands, (H, W); NaN outside the leaf, and where a + b is too small."""
    a, b = (image_CHW[band].astype(np.float64).clip(min=0) for band in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(leaf_HW & (a + b >= MIN_INDEX_SUM), (a - b) / (a + b), np.nan)


def composites(bands: Bands) -> list[Composite]:
    """Return true colour and colour infrared if the bands allow them, else a composite of the first bands."""
    pictures = []
    if bands.has("red", "green", "blue"):
        pictures.append(Composite("true colour", _band_indices(bands, ("red", "green", "blue")), shared_stretch=True))
    if bands.has("nir", "red", "green"):
        pictures.append(
            Composite("colour infrared", _band_indices(bands, ("nir", "red", "green")), shared_stretch=False)
        )
    first, second, third = (min(i, len(bands) - 1) for i in range(3))
    return pictures or [Composite("first bands", (first, second, third), shared_stretch=False)]


def _band_indices(bands: Bands, roles: tuple[str, str, str]) -> tuple[int, int, int]:
    first, second, third = (bands.index(role) for role in roles)
    return first, second, third
