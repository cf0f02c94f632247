"""Contents of a leaf's tissue, pixel by pixel, and the reflectance that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msvae.synthetic.leaf_shapes import LeafMaps
from msvae.synthetic.prospect import leaf_reflectance
from msvae.synthetic.textures import Floats, cell_walls, fractal_noise, smoothstep

CONDITIONS = {"healthy": 0.38, "spotted": 0.24, "chlorotic": 0.13, "senescent": 0.14, "red": 0.11}
"""Share of leaves in each condition."""
LESION_REACH = 3.5
"""Half the side of the box in which a lesion is drawn, in lesion radii. The halo ends at 3."""


@dataclass(frozen=True)
class Health:
    """State of one leaf. Contents are in the units of `leaf_reflectance`; losses and decay are shares of 1."""

    chlorophyll: float
    carotenoids: float
    anthocyanins: float
    structure_n: float
    water_cm: float
    dry_matter: float
    tip_loss: float  # share of chlorophyll lost from base to tip; negative: lost from tip to base
    margin_loss: float  # share of chlorophyll lost from midrib to margin
    chlorosis: float  # share of chlorophyll lost between the veins
    decay: float  # progress of yellowing, then browning, from margin and tip
    num_lesions: int
    lesion_radius: float  # median, in picture widths
    halo_loss: float  # share of chlorophyll lost around a lesion
    rim_brown: float  # brown pigments in the edge of a lesion
    centre_brown: float  # brown pigments in the middle of a lesion


def sample_health(rng: np.random.Generator) -> Health:
    """Return the state of a random leaf: healthy, spotted, chlorotic, senescent or red."""
    names = list(CONDITIONS)
    condition = names[rng.choice(len(names), p=list(CONDITIONS.values()))]
    pale = {"chlorotic": 0.6, "senescent": 0.5, "red": 0.45}.get(condition, 1.0)
    chlorophyll = rng.uniform(26, 58) * pale
    lesions = {"healthy": (0, 4), "spotted": (12, 60), "red": (0, 12)}.get(condition, (0, 16))
    return Health(
        chlorophyll=chlorophyll,
        carotenoids=rng.uniform(0.16, 0.24) * chlorophyll + rng.uniform(1.5, 3.0),
        anthocyanins=rng.uniform(7, 20) if condition == "red" else rng.uniform(0, 1.5),
        structure_n=rng.uniform(1.4, 1.9),
        water_cm=rng.uniform(0.008, 0.018),
        dry_matter=rng.uniform(0.004, 0.010),
        tip_loss=rng.uniform(-0.2, 0.3),
        margin_loss=rng.uniform(0.0, 0.3),
        chlorosis=rng.uniform(0.5, 0.85) if condition == "chlorotic" else rng.uniform(0, 0.15),
        decay=rng.uniform(0.35, 1.0) if condition == "senescent" else 0.0,
        num_lesions=int(rng.integers(*lesions)),
        lesion_radius=rng.uniform(0.004, 0.018),
        halo_loss=rng.uniform(0.1, 0.9),
        rim_brown=rng.uniform(0.3, 1.4) * rng.integers(0, 2),
        centre_brown=rng.uniform(0.35, 1.6),
    )


def tissue_reflectance(rng: np.random.Generator, leaf: LeafMaps, health: Health) -> Floats:
    """Return the reflectance of every leaf pixel under even light: (points, 5), in the order of `leaf.inside`."""
    inside, size_px = leaf.inside, leaf.inside.shape[0]
    halo, rim, centre = _lesions(rng, leaf, health)
    cloud = fractal_noise(rng, size_px, slope=1.6, cycles=2)[inside]
    grain = fractal_noise(rng, size_px, slope=0.6, cycles=24)[inside]
    along, margin, interveinal = leaf.along[inside], leaf.margin[inside], leaf.interveinal[inside]
    net = _small_veins(rng, np.argwhere(inside).astype(np.float64), size_px)
    veins = np.clip(0.95 * leaf.midrib[inside] + 0.75 * leaf.vein[inside] + 0.30 * net, 0, 1)

    away_from_veins = smoothstep(0.0, 1.1, interveinal * smoothstep(0.0, 0.25, margin) + 0.25 * cloud - 0.9 * net)
    front = margin**2 * 0.5 + along * 0.45 + 0.16 * cloud + 0.12 * interveinal
    yellow = health.decay * smoothstep(0.95 - 0.9 * health.decay, 1.15 - 0.7 * health.decay, front)
    dead = smoothstep(1.25 - 0.55 * health.decay, 1.36 - 0.55 * health.decay, front) * (health.decay > 0)
    withered = np.maximum(centre, dead)

    green = (1 - health.tip_loss * (along - 0.5)) * (1 - health.margin_loss * margin**2)
    green *= (1 - health.chlorosis * away_from_veins) * (1 + 0.07 * cloud + 0.05 * grain)
    green *= (1 - 0.85 * yellow) * (1 - health.halo_loss * halo) * (1 - 0.97 * withered)
    mottle = np.clip(1 + 0.25 * cloud + 0.15 * grain, 0.2, None)
    red = np.clip(0.55 + 0.45 * margin + 0.25 * cloud - 0.4 * veins, 0.1, None)
    return leaf_reflectance(
        structure_n=np.maximum(health.structure_n * (1 + 0.02 * grain) + 0.9 * veins + 0.7 * withered, 1.0),
        chlorophyll=np.clip(health.chlorophyll * green * (1 - 0.72 * veins), 0.2, None),
        carotenoids=health.carotenoids * (1 - 0.5 * veins) * (1 - 0.6 * withered),
        brown=health.rim_brown * rim + np.maximum(health.centre_brown * centre, dead) * mottle,
        water_cm=health.water_cm * (1 + 0.5 * veins) * (1 - 0.8 * withered),
        dry_matter=health.dry_matter * np.clip(1 + 0.4 * veins + 0.05 * cloud, 0.5, None),
        anthocyanins=health.anthocyanins * red * (1 - 0.7 * withered) + 5 * health.rim_brown * rim,
    )


def _small_veins(rng: np.random.Generator, points: Floats, size_px: int) -> Floats:
    """Return a coarse and a fine net of veins, (points,), 0 to 1. A net too fine for the pixels is omitted."""
    strength = np.zeros(len(points))
    for weight, spacing in ((0.55, 0.026), (0.45, 0.009)):
        if spacing * size_px >= 2.5:
            strength += weight * cell_walls(rng, points, spacing * size_px)
    return strength


def _lesions(rng: np.random.Generator, leaf: LeafMaps, health: Health) -> tuple[Floats, Floats, Floats]:
    """Return the yellow halo, the dark rim and the dead centre of round lesions with uneven outlines.

    Each is (points,), 0 to 1, in the order of `leaf.inside`. The halo is a few radii wide.
    """
    size_px = leaf.inside.shape[0]
    nearest = np.full(leaf.inside.shape, np.inf)  # distance to the nearest lesion's centre, in its radii
    blade = np.argwhere(leaf.inside & (leaf.margin > 0.08))
    if health.num_lesions == 0 or len(blade) == 0:
        halo, rim, centre = np.zeros((3, np.count_nonzero(leaf.inside)))
        return halo, rim, centre
    for _ in range(health.num_lesions):
        row, column = blade[rng.integers(len(blade))]
        radius_px = health.lesion_radius * size_px * rng.lognormal(0, 0.5)
        stretch, turn = rng.uniform(0.7, 1.0), rng.uniform(0, np.pi)
        box_px = int(np.ceil(LESION_REACH * radius_px)) + 1
        rows = np.arange(max(row - box_px, 0), min(row + box_px + 1, size_px))
        columns = np.arange(max(column - box_px, 0), min(column + box_px + 1, size_px))
        dy, dx = (rows - row)[:, None], (columns - column)[None, :]
        long_axis, short_axis = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
        distance = np.hypot(long_axis * stretch, short_axis / stretch) / radius_px
        box = np.ix_(rows, columns)
        nearest[box] = np.minimum(nearest[box], distance)
    ragged = 1 + 0.14 * fractal_noise(rng, size_px, slope=1.3, cycles=12)
    distance = (nearest * np.clip(ragged, 0.5, 1.6))[leaf.inside]
    return (
        smoothstep(3.0, 1.0, distance),
        smoothstep(1.5, 1.0, distance) * smoothstep(0.55, 0.95, distance),
        smoothstep(1.05, 0.75, distance),
    )
