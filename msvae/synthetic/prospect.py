"""PROSPECT-D: the reflectance of a leaf at the five default bands, computed from its contents.

The model treats a leaf as a pile of N absorbing plates (Jacquemoud & Baret 1990, doi:10.1016/0034-4257(90)90100-Z).
Refractive index and specific absorption are those of PROSPECT-D (Feret et al. 2017, doi:10.1016/j.rse.2017.03.004).

The package `prosail` is not used. Its last release, 2.0.5, is from 2019, and it requires numba and pytest at run time.
Each of its calls computes 2,101 wavelengths of one leaf in 0.4 ms, while a picture needs 5 wavelengths of 30,000
pixels. Its reflectances and these agree within 1e-5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import exp1

from msvae.synthetic.textures import Floats

# At msvae.bands.DEFAULT_WAVELENGTHS_NM: 474.73, 538.71, 650.665, 730.635, 850.59 nm.
REFRACTIVE_INDEX = np.array([1.491627, 1.477816, 1.4473, 1.439673, 1.4347])
ABSORPTION_CHLOROPHYLL = np.array([0.03859, 0.00639, 0.039424, 0.00118, 0.0])  # cm2/ug
ABSORPTION_CAROTENOIDS = np.array([0.13444, 0.01752, 0.0, 0.0, 0.0])  # cm2/ug
ABSORPTION_ANTHOCYANINS = np.array([0.054335, 0.072248, 0.002192, 0.0, 0.0])  # cm2/ug
ABSORPTION_BROWN = np.array([0.44557, 0.368109, 0.188202, 0.091558, 0.022747])  # 1
ABSORPTION_WATER = np.array([0.000142, 0.000486, 0.00333, 0.016705, 0.042132])  # 1/cm
ABSORPTION_DRY_MATTER = np.array([3.06477, 2.3, 2.3, 2.3, 2.3])  # cm2/g

# Below this, absorption vanishes in float64, and the Stokes system becomes 0 / 0.
MIN_ABSORPTION = 1e-9


def interface_transmissivity(max_incidence_deg: float, refractive_index: Floats) -> Floats:
    """Return the transmissivity of a dielectric surface for light from all directions up to `max_incidence_deg`.

    Args: refractive_index (bands,). Returns: (bands,), 0 to 1, mean of both polarisations.
    Source: Stern 1964, Allen 1973; the form used by Jacquemoud & Baret 1990.
    """
    sin2 = np.sin(np.radians(max_incidence_deg)) ** 2
    n2 = refractive_index**2
    plus, minus = n2 + 1.0, n2 - 1.0
    a = (refractive_index + 1.0) ** 2 / 2.0
    k = -(minus**2) / 4.0
    offset = sin2 - plus / 2.0
    b = np.sqrt(np.maximum(offset**2 + k, 0.0)) - offset

    perpendicular = (k**2 / (6 * b**3) + k / b - b / 2) - (k**2 / (6 * a**3) + k / a - a / 2)
    pole_a, pole_b = 2 * plus * a - minus**2, 2 * plus * b - minus**2
    parallel = (
        -2 * n2 * (b - a) / plus**2
        - 2 * n2 * plus * np.log(b / a) / minus**2
        + n2 * (1 / b - 1 / a) / 2
        + 16 * n2**2 * (n2**2 + 1) * np.log(pole_b / pole_a) / (plus**3 * minus**2)
        + 16 * n2**3 * (1 / pole_b - 1 / pole_a) / plus**3
    )
    transmissivity: Floats = (perpendicular + parallel) / (2 * sin2)
    return transmissivity


ENTRY_TOP = interface_transmissivity(40.0, REFRACTIVE_INDEX)
ENTRY_DIFFUSE = interface_transmissivity(90.0, REFRACTIVE_INDEX)
EXIT_DIFFUSE = ENTRY_DIFFUSE / REFRACTIVE_INDEX**2


def leaf_reflectance(
    structure_n: ArrayLike,
    chlorophyll: ArrayLike,
    carotenoids: ArrayLike,
    brown: ArrayLike,
    water_cm: ArrayLike,
    dry_matter: ArrayLike,
    anthocyanins: ArrayLike,
) -> Floats:
    """Return the hemispherical reflectance of a leaf at the five default bands.

    Args: arrays that broadcast to one shape (...): number of plates (at least 1), chlorophyll a+b,
        carotenoids, brown pigments (arbitrary unit), water (cm), dry matter (g/cm2) and anthocyanins;
        pigments without a unit here are in ug/cm2.
    Returns: (..., 5) float64, reflectance 0 to 1.
    Source: Jacquemoud & Baret 1990 (plates), Feret et al. 2017 (PROSPECT-D).
    """
    contents = (structure_n, chlorophyll, carotenoids, brown, water_cm, dry_matter, anthocyanins)
    n, cab, car, brown_, water, dry, ant = (np.asarray(content, dtype=np.float64) for content in contents)
    shape = np.broadcast_shapes(*(np.shape(content) for content in contents))
    reflectance = np.empty((*shape, len(REFRACTIVE_INDEX)))
    for band in range(len(REFRACTIVE_INDEX)):
        absorption = (
            cab * ABSORPTION_CHLOROPHYLL[band]
            + car * ABSORPTION_CAROTENOIDS[band]
            + ant * ABSORPTION_ANTHOCYANINS[band]
            + brown_ * ABSORPTION_BROWN[band]
            + water * ABSORPTION_WATER[band]
            + dry * ABSORPTION_DRY_MATTER[band]
        )
        reflectance[..., band] = _pile_reflectance(n, np.maximum(absorption / n, MIN_ABSORPTION), band)
    return reflectance


def _pile_reflectance(structure_n: Floats, plate_absorption: Floats, band: int) -> Floats:
    """Return the reflectance of N plates, arrays of one shape: one top plate and N - 1 below it (Stokes 1862)."""
    inside = (1 - plate_absorption) * np.exp(-plate_absorption) + plate_absorption**2 * exp1(plate_absorption)
    exit_reflected = 1 - EXIT_DIFFUSE[band]
    passed = inside * EXIT_DIFFUSE[band] / (1 - (exit_reflected * inside) ** 2)

    top_t = ENTRY_TOP[band] * passed
    top_r = 1 - ENTRY_TOP[band] + exit_reflected * inside * top_t
    t = ENTRY_DIFFUSE[band] * passed
    r = 1 - ENTRY_DIFFUSE[band] + exit_reflected * inside * t

    root = np.sqrt((1 + r + t) * (1 + r - t) * (1 - r + t) * (1 - r - t))
    a2 = ((1 + r**2 - t**2 + root) / (2 * r)) ** 2
    inverse_b = 2 * t / (1 - r**2 + t**2 + root)
    decay = inverse_b ** (2 * (structure_n - 1))
    below = np.sqrt(a2) * (1 - decay) / (a2 - decay)
    reflectance: Floats = top_r + top_t * below * t / (1 - below * r)
    return reflectance
