"""Random textures and the light that falls on them. Pictures are (H, W), square, one picture width across."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Light:
    """Where the sun stands: azimuth from the x axis (picture frame, y down) and elevation over the picture."""

    azimuth_rad: float
    elevation_rad: float

    def shading(self, relief: Floats, softness_px: float = 0.7) -> Floats:
        """Irradiance on a surface relative to a flat one, (H, W); Lambert's cosine plus skylight.

        Args: relief (H, W), heights in picture widths.
        """
        heights_px = gaussian_filter(relief, softness_px) * relief.shape[0]
        slope_y, slope_x = np.gradient(heights_px)
        towards_sun = -slope_x * np.cos(self.azimuth_rad) - slope_y * np.sin(self.azimuth_rad)
        cosine = np.sin(self.elevation_rad) + np.cos(self.elevation_rad) * towards_sun
        cosine /= np.sqrt(1 + slope_x**2 + slope_y**2) * np.sin(self.elevation_rad)
        sun_share = 0.75
        irradiance: Floats = 1 - sun_share + sun_share * np.clip(cosine, 0.0, 1.6)
        return irradiance


def fractal_noise(rng: np.random.Generator, size_px: int, slope: float, cycles: float = 1.0) -> Floats:
    """Noise whose amplitude falls as frequency**-slope above `cycles` per picture; mean 0, deviation 1."""
    spectrum = fft.rfft2(rng.standard_normal((size_px, size_px)))
    fy, fx = fft.fftfreq(size_px) * size_px, fft.rfftfreq(size_px) * size_px
    frequency = np.hypot(fy[:, None], fx[None, :])
    spectrum *= np.maximum(frequency, cycles) ** -slope
    spectrum[0, 0] = 0.0
    noise = fft.irfft2(spectrum, s=(size_px, size_px))
    normalised: Floats = noise / noise.std()
    return normalised


def cell_walls(rng: np.random.Generator, points: Floats, spacing_px: float) -> Floats:
    """A net of walls between random cells, such as the finest veins of a leaf.

    Args: points (points, 2), row and column in pixels; spacing_px, about one cell's width.
    Returns: (points,), 1 on a wall, 0 inside a cell.
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


def smoothstep(low: float, high: float, values: Floats) -> Floats:
    """0 up to `low`, 1 from `high` on, smooth in between; falling when `high` is less than `low`."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
