"""Bare soil: dry crumbs on moist ground with a few stones, its relief included."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from msvae.synthetic.textures import Light, fractal_noise, smoothstep

Floats = NDArray[np.float64]

# Bright soil at msvae.bands.DEFAULT_WAVELENGTHS_NM, as distributed with PROSAIL.
DRY_SOIL = np.array([0.2255, 0.2531, 0.3084, 0.3548, 0.4081])
WET_SOIL = np.array([0.0250, 0.0267, 0.0363, 0.0479, 0.0711])


def draw_soil(rng: np.random.Generator, size_px: int, light: Light) -> Floats:
    """Reflectance of a lit patch of soil, (H, W, 5)."""
    crumbs = fractal_noise(rng, size_px, slope=1.7, cycles=10)
    dryness = 0.35 * fractal_noise(rng, size_px, slope=2.0, cycles=1.5) + 0.12 * crumbs + rng.uniform(-0.2, 0.5)
    relief = np.zeros(crumbs.shape)
    dryness, relief = _scatter(rng, dryness, relief, int(rng.integers(500, 1200)), (0.003, 0.030), spread=0.15)
    relief = relief * (1 + 0.35 * crumbs) + 0.0026 * crumbs
    grey, relief = _scatter(rng, np.zeros(relief.shape), relief, int(rng.integers(0, 16)), (0.010, 0.035), spread=0.03)

    moist_share = 0.85 - 0.7 * smoothstep(-0.6, 1.2, dryness)
    soil = (1 - moist_share)[..., None] * DRY_SOIL + moist_share[..., None] * WET_SOIL
    grey = grey[..., None]
    soil = np.where(grey == 0, soil, np.clip(0.35 * DRY_SOIL + 0.10 + grey, 0.08, 0.3))
    grain = 1 + 0.07 * fractal_noise(rng, size_px, slope=0.3, cycles=40)
    hollow = np.clip(1 + 14 * np.minimum(relief, 0), 0.6, 1)
    lit: Floats = soil * np.clip(grain * hollow * light.shading(relief), 0.1, 1.8)[..., None]
    return lit


def _scatter(
    rng: np.random.Generator,
    material: Floats,
    relief: Floats,
    num_lumps: int,
    radii: tuple[float, float],
    spread: float,
) -> tuple[Floats, Floats]:
    """Lays rounded lumps on the ground, small ones most often.

    Args: material and relief (H, W); radii, from and to, in picture widths; spread, how far a lump's
        material differs from the ground's.
    Returns: material and relief (H, W) with the lumps.
    """
    size_px = relief.shape[0]
    material, relief = material.copy(), relief.copy()
    for _ in range(num_lumps):
        radius_px = size_px * radii[0] * (radii[1] / radii[0]) ** (rng.uniform() ** 3)
        row, column = rng.uniform(0, size_px, 2)
        flatness, turn, own = rng.uniform(0.6, 1.0), rng.uniform(0, np.pi), rng.normal(0, 1)
        box_px = int(radius_px) + 2
        top, left = max(int(row) - box_px, 0), max(int(column) - box_px, 0)
        window = np.s_[top : int(row) + box_px + 1, left : int(column) + box_px + 1]
        dy, dx = np.indices(relief[window].shape) + np.array([top - row, left - column])[:, None, None]
        distance = np.hypot(np.cos(turn) * dx + np.sin(turn) * dy, (np.cos(turn) * dy - np.sin(turn) * dx) / flatness)
        dome = 0.55 * radius_px / size_px * np.sqrt(np.clip(1 - (distance / radius_px) ** 2, 0, None))
        lump = dome > 0
        relief[window] += dome
        material[window][lump] += own * spread
    return material, relief
