"""Random textures, light on a relief, and bare soil.

Arrays (H, W) show a square picture. Lengths and heights are in picture widths unless a name ends in `_px`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Range = tuple[float, float]

SUN_SHARE = 0.75  # of the irradiance on a flat surface; the rest is skylight

# Reflectance of bright soil at msvae.bands.DEFAULT_WAVELENGTHS_NM, as distributed with PROSAIL.
DRY_SOIL = np.array([0.2255, 0.2531, 0.3084, 0.3548, 0.4081])
WET_SOIL = np.array([0.0250, 0.0267, 0.0363, 0.0479, 0.0711])


@dataclass(frozen=True)
class Light:
    """Direction of the sun: azimuth from the x axis (y points down) and elevation above the picture plane."""

    azimuth_rad: float
    elevation_rad: float

    def shading(self, relief: Floats, softness_px: float = 0.7) -> Floats:
        """Return the irradiance on a surface relative to a flat one: Lambert's cosine law plus skylight.

        Args: relief (H, W), heights in picture widths. Returns: (H, W).
        """
        heights_px = gaussian_filter(relief, softness_px) * relief.shape[0]
        slope_y, slope_x = np.gradient(heights_px)
        towards_sun = -slope_x * np.cos(self.azimuth_rad) - slope_y * np.sin(self.azimuth_rad)
        cosine = np.sin(self.elevation_rad) + np.cos(self.elevation_rad) * towards_sun
        cosine /= np.sqrt(1 + slope_x**2 + slope_y**2) * np.sin(self.elevation_rad)
        irradiance: Floats = 1 - SUN_SHARE + SUN_SHARE * np.clip(cosine, 0.0, 1.6)
        return irradiance


def smoothstep(low: float, high: float, values: Floats) -> Floats:
    """Return 0 up to `low`, 1 from `high` on and a smooth cubic between; it falls if `high` is less than `low`."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def fractal_noise(rng: np.random.Generator, size_px: int, slope: float, cycles: float = 1.0) -> Floats:
    """Return noise (H, W) of mean 0 and standard deviation 1.

    Its amplitude is proportional to frequency**-slope above `cycles` periods per picture, and constant below.
    """
    spectrum = fft.rfft2(rng.standard_normal((size_px, size_px)))
    fy, fx = fft.fftfreq(size_px) * size_px, fft.rfftfreq(size_px) * size_px
    frequency = np.hypot(fy[:, None], fx[None, :])
    spectrum *= np.maximum(frequency, cycles) ** -slope
    spectrum[0, 0] = 0.0
    noise = fft.irfft2(spectrum, s=(size_px, size_px))
    normalised: Floats = noise / noise.std()
    return normalised


@dataclass(frozen=True)
class Waves:
    """Smooth random field: a sum of plane waves, the same at every resolution."""

    wavevectors: Floats  # (waves, 2), radians per unit length
    phases_rad: Floats
    amplitudes: Floats

    @classmethod
    def sample(cls, rng: np.random.Generator, cycles: Range, num_waves: int = 6) -> Waves:
        """Return waves with `cycles` (from, to) periods per unit length; the field has unit standard deviation."""
        wavenumber = rng.uniform(*cycles, num_waves)
        heading = rng.uniform(0, 2 * np.pi, num_waves)
        vectors = 2 * np.pi * wavenumber[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        amplitudes = 1 / wavenumber
        amplitudes *= np.sqrt(2 / np.sum(amplitudes**2))
        return cls(vectors, rng.uniform(0, 2 * np.pi, num_waves), amplitudes)

    def __call__(self, x: Floats, y: Floats) -> Floats:
        """Return the field at points x, y (H, W), which must form a regular grid; the grid may be rotated.

        On such a grid, sin(row phase + column phase) splits into products of rows and columns.
        """
        kx, ky = self.wavevectors.T
        row_phases = np.outer(x[:, 0], kx) + np.outer(y[:, 0], ky) + self.phases_rad
        column_phases = np.outer(kx, x[0] - x[0, 0]) + np.outer(ky, y[0] - y[0, 0])
        field: Floats = (self.amplitudes * np.sin(row_phases)) @ np.cos(column_phases)
        field += (self.amplitudes * np.cos(row_phases)) @ np.sin(column_phases)
        return field


def cell_walls(rng: np.random.Generator, points: Floats, spacing_px: float) -> Floats:
    """Return a net of walls between random cells, such as the finest veins of a leaf.

    Args: points (points, 2), row and column in pixels; spacing_px, approximate width of a cell.
    Returns: (points,), up to 1 on a wall, 0 inside a cell.
    """
    low, high = points.min(axis=0) - 2 * spacing_px, points.max(axis=0) + 2 * spacing_px
    rows, columns = (np.arange(low[axis], high[axis], spacing_px) for axis in (0, 1))
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    seeds = grid + rng.uniform(-0.5, 0.5, grid.shape) * spacing_px
    distances, _ = cKDTree(seeds).query(points, k=2)
    to_wall_px = (distances[:, 1] - distances[:, 0]) / 2
    half_width = np.hypot(0.10 * spacing_px, 0.45)
    walls: Floats = 0.10 * spacing_px / half_width * np.exp(-((to_wall_px / half_width) ** 2))
    return walls


def draw_soil(rng: np.random.Generator, size_px: int, light: Light) -> Floats:
    """Return the reflectance (H, W, 5) of lit soil: dry crumbs on moist ground, and a few stones."""
    crumbs = fractal_noise(rng, size_px, slope=1.7, cycles=10)
    dryness = 0.35 * fractal_noise(rng, size_px, slope=2.0, cycles=1.5) + 0.12 * crumbs + rng.uniform(-0.2, 0.5)
    relief = np.zeros(crumbs.shape)
    _add_lumps(rng, dryness, relief, int(rng.integers(500, 1200)), (0.003, 0.030), spread=0.15)
    relief = relief * (1 + 0.35 * crumbs) + 0.0026 * crumbs
    stone = np.zeros(relief.shape)
    _add_lumps(rng, stone, relief, int(rng.integers(0, 16)), (0.010, 0.035), spread=0.03)

    moist_share = 0.85 - 0.7 * smoothstep(-0.6, 1.2, dryness)
    soil = (1 - moist_share)[..., None] * DRY_SOIL + moist_share[..., None] * WET_SOIL
    stone = stone[..., None]
    soil = np.where(stone == 0, soil, np.clip(0.35 * DRY_SOIL + 0.10 + stone, 0.08, 0.3))
    grain = 1 + 0.07 * fractal_noise(rng, size_px, slope=0.3, cycles=40)
    hollow = np.clip(1 + 14 * np.minimum(relief, 0), 0.6, 1)
    lit: Floats = soil * np.clip(grain * hollow * light.shading(relief), 0.1, 1.8)[..., None]
    return lit


def _add_lumps(
    rng: np.random.Generator,
    material: Floats,
    relief: Floats,
    num_lumps: int,
    radii: Range,
    spread: float,
) -> None:
    """Add rounded lumps to the ground, in place; small lumps are the most frequent.

    Args: material and relief (H, W); radii, from and to, in picture widths; spread, standard deviation of the
        difference between a lump's material and the ground's.
    """
    size_px = relief.shape[0]
    for _ in range(num_lumps):
        radius_px = size_px * radii[0] * (radii[1] / radii[0]) ** (rng.uniform() ** 3)
        row, column = rng.uniform(0, size_px, 2)
        flatness, turn, own = rng.uniform(0.6, 1.0), rng.uniform(0, np.pi), rng.normal(0, 1)
        box_px = int(radius_px) + 2
        top, left = max(int(row) - box_px, 0), max(int(column) - box_px, 0)
        box = np.s_[top : int(row) + box_px + 1, left : int(column) + box_px + 1]
        dy, dx = np.indices(relief[box].shape) + np.array([top - row, left - column])[:, None, None]
        distance = np.hypot(np.cos(turn) * dx + np.sin(turn) * dy, (np.cos(turn) * dy - np.sin(turn) * dx) / flatness)
        dome = 0.55 * radius_px / size_px * np.sqrt(np.clip(1 - (distance / radius_px) ** 2, 0, None))
        relief[box] += dome
        material[box][dome > 0] += own * spread
