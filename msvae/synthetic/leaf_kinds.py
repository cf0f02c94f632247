"""Draws leaves of several kinds at random: simple, toothed, lobed, palmate and of three leaflets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from msvae.synthetic.leaf_shapes import Blade, Leaf, Waves


def _side_offset(rng: np.random.Generator) -> float:
    return float(rng.choice([0.0, rng.uniform(0.25, 0.5)], p=[0.4, 0.6]))


def _bend(rng: np.random.Generator) -> float:
    return float(rng.normal(0, 0.14))


def _ovate(rng: np.random.Generator) -> tuple[Blade, ...]:
    return (
        Blade(
            half_width=rng.uniform(0.24, 0.34),
            rise=rng.uniform(0.45, 0.7),
            fall=rng.uniform(0.8, 1.15),
            num_veins=int(rng.integers(7, 12)),
            vein_angle_rad=np.radians(rng.uniform(46, 60)),
            vein_arch=rng.uniform(0.2, 0.6),
            bend=_bend(rng),
            side_offset=_side_offset(rng),
            tooth_depth=float(rng.choice([0.0, rng.uniform(0.04, 0.1)])),
            teeth_per_vein=int(rng.integers(2, 5)),
        ),
    )


def _heart(rng: np.random.Generator) -> tuple[Blade, ...]:
    return (
        Blade(
            half_width=rng.uniform(0.34, 0.42),
            rise=rng.uniform(0.36, 0.46),
            fall=rng.uniform(0.85, 1.1),
            num_veins=int(rng.integers(6, 9)),
            vein_angle_rad=np.radians(rng.uniform(48, 60)),
            vein_arch=rng.uniform(0.15, 0.4),
            bend=_bend(rng) * 0.6,
            sweep=rng.uniform(0.45, 0.7),
            side_offset=_side_offset(rng),
            tooth_depth=float(rng.choice([0.0, rng.uniform(0.03, 0.07)])),
            teeth_per_vein=int(rng.integers(2, 4)),
        ),
    )


def _lanceolate(rng: np.random.Generator) -> tuple[Blade, ...]:
    return (
        Blade(
            half_width=rng.uniform(0.12, 0.18),
            rise=rng.uniform(0.6, 0.9),
            fall=rng.uniform(0.9, 1.2),
            num_veins=int(rng.integers(12, 19)),
            vein_angle_rad=np.radians(rng.uniform(42, 56)),
            vein_arch=rng.uniform(0.4, 1.0),
            bend=_bend(rng) * 1.6,
            side_offset=_side_offset(rng),
            tooth_depth=float(rng.choice([0.0, rng.uniform(0.05, 0.1)])),
        ),
    )


def _oak(rng: np.random.Generator) -> tuple[Blade, ...]:
    return (
        Blade(
            half_width=rng.uniform(0.28, 0.36),
            rise=rng.uniform(0.8, 1.1),
            fall=rng.uniform(0.45, 0.6),
            num_veins=int(rng.integers(5, 8)),
            vein_angle_rad=np.radians(rng.uniform(60, 70)),
            vein_arch=rng.uniform(0.0, 0.1),
            bend=_bend(rng),
            lobe_depth=rng.uniform(0.3, 0.55),
            side_offset=_side_offset(rng),
        ),
    )


def _maple(rng: np.random.Generator) -> tuple[Blade, ...]:
    spread = np.radians(rng.uniform(40, 47))
    width, tooth = rng.uniform(0.23, 0.28), rng.uniform(0.12, 0.24)
    reach = {0: 0.95, 1: rng.uniform(0.78, 0.88), 2: rng.uniform(0.5, 0.6)}
    return tuple(
        Blade(
            half_width=width * (1.0 + 0.12 * abs(place)),
            rise=0.42,
            fall=rng.uniform(0.85, 0.95),
            num_veins=6,
            vein_angle_rad=np.radians(rng.uniform(38, 44)),
            vein_arch=0.1,
            bend=-0.16 * place / 2 + rng.normal(0, 0.03),
            tooth_depth=tooth,
            base_xy=(0.2, 0.0),
            angle_rad=place * spread + rng.normal(0, 0.04),
            length=reach[abs(place)],
        )
        for place in (-2, -1, 0, 1, 2)
    )


def _leaflets(rng: np.random.Generator) -> tuple[Blade, ...]:
    width, tooth = rng.uniform(0.31, 0.38), float(rng.choice([0.0, rng.uniform(0.05, 0.1)]))
    spread = rng.uniform(1.2, 1.5)
    bases = ((0.22, -0.006), (0.36, 0.0), (0.22, 0.006))
    return tuple(
        Blade(
            half_width=width * rng.uniform(0.95, 1.05),
            rise=rng.uniform(0.5, 0.6),
            fall=rng.uniform(0.7, 0.9),
            num_veins=int(rng.integers(7, 10)),
            vein_angle_rad=np.radians(rng.uniform(46, 56)),
            vein_arch=0.3,
            bend=rng.normal(0, 0.06),
            tooth_depth=tooth,
            teeth_per_vein=2,
            base_xy=base_xy,
            angle_rad=place * spread,
            length=0.68 if place == 0 else 0.6,
            side_offset=rng.uniform(0, 0.5),
        )
        for place, base_xy in zip((-1, 0, 1), bases, strict=True)
    )


@dataclass(frozen=True)
class LeafKind:
    """How often a kind is drawn, how many of its leaves fill a picture, and how one is made."""

    share: float
    num_leaves: tuple[int, ...]
    draw_blades: Callable[[np.random.Generator], tuple[Blade, ...]]


LEAF_KINDS = (
    LeafKind(0.28, (1, 1, 1, 2), _ovate),
    LeafKind(0.14, (1, 1, 2), _heart),
    LeafKind(0.16, (2, 3), _lanceolate),
    LeafKind(0.14, (1, 1, 2), _oak),
    LeafKind(0.15, (1,), _maple),
    LeafKind(0.13, (1,), _leaflets),
)


def _eaten(rng: np.random.Generator) -> tuple[tuple[float, float, float], ...]:
    num_bites = int(rng.integers(1, 7)) if rng.uniform() < 0.25 else 0
    return tuple((rng.uniform(0.2, 0.9), rng.normal(0, 0.14), 0.010 * rng.lognormal(0, 0.6)) for _ in range(num_bites))


def draw_leaves(rng: np.random.Generator) -> list[Leaf]:
    """The leaves of one picture, all of one kind, lowest first, each about as long as the picture is wide."""
    shares = [kind.share for kind in LEAF_KINDS]
    kind = LEAF_KINDS[rng.choice(len(LEAF_KINDS), p=np.array(shares) / sum(shares))]
    num_leaves = int(rng.choice(kind.num_leaves))
    heading_rad = rng.uniform(0, 2 * np.pi)
    leaves = []
    for place in np.arange(num_leaves) - (num_leaves - 1) / 2:
        aside = 0.7 * place / num_leaves + rng.normal(0, 0.02)
        ahead = rng.normal(0, 0.04)
        leaf_heading_rad = heading_rad + rng.normal(0, 0.3) * (num_leaves > 1)
        leaf = Leaf(
            blades=kind.draw_blades(rng),
            warp=(Waves.draw(rng, (1.0, 9.0)), Waves.draw(rng, (1.0, 9.0))),
            warp_depth=rng.uniform(0.004, 0.010),
            eaten=_eaten(rng),
            quilting=rng.uniform(0.04, 0.12),
            petiole_length=rng.uniform(0.08, 0.25),
            petiole_bend=rng.normal(0, 0.5),
            centre_xy=(
                0.5 - aside * np.sin(heading_rad) + ahead * np.cos(heading_rad),
                0.5 + aside * np.cos(heading_rad) + ahead * np.sin(heading_rad),
            ),
            heading_rad=leaf_heading_rad,
            length=rng.uniform(0.95, 1.05),
        )
        leaves.append(leaf)
    return leaves
