"""What a leaf is made of, pixel by pixel, and the reflectance that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msvae.synthetic.leaf_shapes import LeafMaps
from msvae.synthetic.prospect import leaf_reflectance
from msvae.synthetic.textures import cell_walls, fractal_noise, smoothstep

Floats = NDArray[np.float64]

CONDITIONS = {"healthy": 0.38, "spotted": 0.24, "chlorotic": 0.13, "senescent": 0.14, "red": 0.11}


@dataclass(frozen=True)
class Health:
    """One leaf's state. Contents are in the units of `leaf_reflectance`, the rest are shares of 1."""

    chlorophyll: float
    carotenoids: float
    anthocyanins: float
    structure_n: float
    water_cm: float
    dry_matter: float
    tip_loss: float  # share of chlorophyll lost from base to tip; negative: lost from tip to base
    margin_loss: float
    chlorosis: float  # share of chlorophyll lost between the veins
    decay: float  # how far yellowing and then browning has come in from margin and tip
    num_lesions: int
    lesion_radius: float  # median, in picture widths
    halo_loss: float  # share of chlorophyll lost around a lesion
    rim_brown: float  # brown pigments of a lesion's edge and of its heart
    heart_brown: float


def draw_health(rng: np.random.Generator) -> Health:
    """A leaf's state: healthy, spotted, chlorotic, senescent or red."""
    names = list(CONDITIONS)
    condition = names[rng.choice(len(names), p=list(CONDITIONS.values()))]
    pale = {"chlorotic": 0.6, "senescent": 0.5, "red": 0.45}.get(condition, 1.0)
    chlorophyll = rng.uniform(26, 58) * pale
    spots = {"healthy": (0, 4), "spotted": (12, 60), "red": (0, 12)}.get(condition, (0, 16))
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
        num_lesions=int(rng.integers(*spots)),
        lesion_radius=rng.uniform(0.004, 0.018),
        halo_loss=rng.uniform(0.1, 0.9),
        rim_brown=rng.uniform(0.3, 1.4) * rng.integers(0, 2),
        heart_brown=rng.uniform(0.35, 1.6),
    )


@dataclass(frozen=True)
class Lesions:
    """How strongly a pixel (H, W) belongs to a lesion's yellow halo, its dark rim and its dead heart, 0 to 1."""

    halo: Floats
    rim: Floats
    heart: Floats


def tissue_reflectance(rng: np.random.Generator, leaf: LeafMaps, health: Health) -> Floats:
    """Reflectance of every leaf pixel, (points, 5), in the order of `leaf.inside`, evenly lit."""
    inside, size_px = leaf.inside, leaf.inside.shape[0]
    lesions = _draw_lesions(rng, leaf, health)
    cloud = fractal_noise(rng, size_px, slope=1.6, cycles=2)[inside]
    grain = fractal_noise(rng, size_px, slope=0.6, cycles=24)[inside]
    halo, rim, heart = lesions.halo[inside], lesions.rim[inside], lesions.heart[inside]
    along, margin, interveinal = leaf.along[inside], leaf.margin[inside], leaf.interveinal[inside]
    points = np.argwhere(inside).astype(np.float64)
    net = _net(rng, points, size_px)
    veins = np.clip(0.95 * leaf.midrib[inside] + 0.75 * leaf.vein[inside] + 0.30 * net, 0, 1)

    away_from_veins = smoothstep(0.0, 1.1, interveinal * smoothstep(0.0, 0.25, margin) + 0.25 * cloud - 0.9 * net)
    front = margin**2 * 0.5 + along * 0.45 + 0.16 * cloud + 0.12 * interveinal
    yellow = health.decay * smoothstep(0.95 - 0.9 * health.decay, 1.15 - 0.7 * health.decay, front)
    dead = smoothstep(1.25 - 0.55 * health.decay, 1.36 - 0.55 * health.decay, front) * (health.decay > 0)
    withered = np.maximum(heart, dead)

    green = (1 - health.tip_loss * (along - 0.5)) * (1 - health.margin_loss * margin**2)
    green *= (1 - health.chlorosis * away_from_veins) * (1 + 0.07 * cloud + 0.05 * grain)
    green *= (1 - 0.85 * yellow) * (1 - health.halo_loss * halo) * (1 - 0.97 * withered)
    mottle = np.clip(1 + 0.25 * cloud + 0.15 * grain, 0.2, None)
    red = np.clip(0.55 + 0.45 * margin + 0.25 * cloud - 0.4 * veins, 0.1, None)
    return leaf_reflectance(
        structure_n=np.maximum(health.structure_n * (1 + 0.02 * grain) + 0.9 * veins + 0.7 * withered, 1.0),
        chlorophyll=np.clip(health.chlorophyll * green * (1 - 0.72 * veins), 0.2, None),
        carotenoids=health.carotenoids * (1 - 0.5 * veins) * (1 - 0.6 * withered),
        brown=health.rim_brown * rim + np.maximum(health.heart_brown * heart, dead) * mottle,
        water_cm=health.water_cm * (1 + 0.5 * veins) * (1 - 0.8 * withered),
        dry_matter=health.dry_matter * np.clip(1 + 0.4 * veins + 0.05 * cloud, 0.5, None),
        anthocyanins=health.anthocyanins * red * (1 - 0.7 * withered) + 5 * health.rim_brown * rim,
    )


def _net(rng: np.random.Generator, points: Floats, size_px: int) -> Floats:
    """The net of small veins, coarse and fine, as far as pixels can show it; (points,), 0 to 1."""
    spacings_px = [share * size_px for share in (0.026, 0.009)]
    nets = [cell_walls(rng, points, spacing) for spacing in spacings_px if spacing >= 2.5]
    weights = (0.55, 0.45)
    strength = np.zeros(len(points))
    for weight, net in zip(weights, nets, strict=False):
        strength += weight * net
    return strength


def _draw_lesions(rng: np.random.Generator, leaf: LeafMaps, health: Health) -> Lesions:
    """Round spots of uneven outline; the halo, a few radii wide, is part of the lesion."""
    size_px = leaf.inside.shape[0]
    nearest = np.full(leaf.inside.shape, np.inf)
    blade = np.argwhere(leaf.inside & (leaf.margin > 0.08))
    reach = 3.5
    if health.num_lesions == 0 or len(blade) == 0:
        return Lesions(*np.zeros((3, *leaf.inside.shape)))
    for _ in range(health.num_lesions):
        row, column = blade[rng.integers(len(blade))]
        radius_px = health.lesion_radius * size_px * rng.lognormal(0, 0.5)
        stretch, turn = rng.uniform(0.7, 1.0), rng.uniform(0, np.pi)
        box_px = int(np.ceil(reach * radius_px)) + 1
        rows = np.arange(max(row - box_px, 0), min(row + box_px + 1, size_px))
        columns = np.arange(max(column - box_px, 0), min(column + box_px + 1, size_px))
        dy, dx = (rows - row)[:, None], (columns - column)[None, :]
        long_axis, short_axis = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
        distance = np.hypot(long_axis * stretch, short_axis / stretch) / radius_px
        window = np.ix_(rows, columns)
        nearest[window] = np.minimum(nearest[window], distance)
    ragged = 1 + 0.14 * fractal_noise(rng, size_px, slope=1.3, cycles=12)
    nearest = nearest * np.clip(ragged, 0.5, 1.6)
    return Lesions(
        halo=smoothstep(3.0, 1.0, nearest),
        rim=smoothstep(1.5, 1.0, nearest) * smoothstep(0.55, 0.95, nearest),
        heart=smoothstep(1.05, 0.75, nearest),
    )
