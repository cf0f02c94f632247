"""Outlines and veins of random leaves, as formulas, so that a picture of any size shows the same leaf.

Pictures span 0 to 1, x to the right and y down. A leaf consists of one or more blades. In the frame of a blade,
u runs along the midrib from base (0) to tip (1) and v across it, both in blade lengths. H, W are pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from msvae.synthetic.textures import Floats, Mask, Range, Waves

OUTSIDE = 9.0
"""Margin coordinate of points far outside of a blade."""


@dataclass(frozen=True)
class Blade:
    """One blade. Lengths are in blade lengths, except `base_xy` and `length`, which are in the leaf's frame."""

    half_width: float
    rise: float  # exponents of the outline u**rise * (1 - u)**fall
    fall: float
    num_veins: int
    vein_angle_rad: float
    vein_arch: float
    bend: float = 0.0
    sweep: float = 0.0  # how far the margin extends behind the base; a positive value makes a heart shape
    lobe_depth: float = 0.0
    tooth_depth: float = 0.0
    teeth_per_vein: int = 1
    side_offset: float = 0.0  # offset of the veins on the left side, in vein distances
    base_xy: tuple[float, float] = (0.0, 0.0)
    angle_rad: float = 0.0
    length: float = 1.0


@dataclass(frozen=True)
class Leaf:
    """A leaf in the picture: its blades, centre, heading and length (in picture widths)."""

    blades: tuple[Blade, ...]
    warp: tuple[Waves, Waves]
    warp_depth: float
    holes: tuple[tuple[float, float, float], ...]  # eaten by insects: centre along and across, radius; leaf lengths
    quilting: float  # how far the blade bulges between its veins
    petiole_length: float
    petiole_bend: float
    centre_xy: tuple[float, float]
    heading_rad: float
    length: float

    def scaled(self, factor: float) -> Leaf:
        """Return the same leaf, `factor` times as large, about the same centre."""
        return replace(self, length=self.length * factor)


def _zero_or(rng: np.random.Generator, bounds: Range) -> float:
    """Return 0 in half of all cases, else a value between `bounds`."""
    return float(rng.choice([0.0, rng.uniform(*bounds)]))


def _one_blade(
    rng: np.random.Generator,
    half_width: Range,
    rise: Range,
    fall: Range,
    num_veins: tuple[int, int],
    vein_angle_deg: Range,
    vein_arch: Range,
    bend: float = 1.0,
    sweep: Range | None = None,
    lobe_depth: Range | None = None,
    tooth_depth: Range | None = None,
    teeth_per_vein: tuple[int, int] | None = None,
) -> tuple[Blade, ...]:
    """Return a simple leaf. Parameters are ranges (from, to), except the factor `bend`; None turns a feature off."""
    return (
        Blade(
            half_width=rng.uniform(*half_width),
            rise=rng.uniform(*rise),
            fall=rng.uniform(*fall),
            num_veins=int(rng.integers(*num_veins)),
            vein_angle_rad=np.radians(rng.uniform(*vein_angle_deg)),
            vein_arch=rng.uniform(*vein_arch),
            bend=rng.normal(0, 0.14) * bend,
            sweep=rng.uniform(*sweep) if sweep else 0.0,
            lobe_depth=rng.uniform(*lobe_depth) if lobe_depth else 0.0,
            side_offset=float(rng.choice([0.0, rng.uniform(0.25, 0.5)], p=[0.4, 0.6])),
            tooth_depth=_zero_or(rng, tooth_depth) if tooth_depth else 0.0,
            teeth_per_vein=int(rng.integers(*teeth_per_vein)) if teeth_per_vein else 1,
        ),
    )


def _palmate(rng: np.random.Generator) -> tuple[Blade, ...]:
    """Return a maple leaf: five toothed blades that overlap at one base."""
    spread = np.radians(rng.uniform(40, 47))
    width, tooth_depth = rng.uniform(0.23, 0.28), rng.uniform(0.12, 0.24)
    length = {0: 0.95, 1: rng.uniform(0.78, 0.88), 2: rng.uniform(0.5, 0.6)}
    return tuple(
        Blade(
            half_width=width * (1.0 + 0.12 * abs(side)),
            rise=0.42,
            fall=rng.uniform(0.85, 0.95),
            num_veins=6,
            vein_angle_rad=np.radians(rng.uniform(38, 44)),
            vein_arch=0.1,
            bend=-0.16 * side / 2 + rng.normal(0, 0.03),
            tooth_depth=tooth_depth,
            base_xy=(0.2, 0.0),
            angle_rad=side * spread + rng.normal(0, 0.04),
            length=length[abs(side)],
        )
        for side in (-2, -1, 0, 1, 2)
    )


def _three_leaflets(rng: np.random.Generator) -> tuple[Blade, ...]:
    """Return a leaf of three separate leaflets."""
    width, tooth_depth = rng.uniform(0.31, 0.38), _zero_or(rng, (0.05, 0.1))
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
            tooth_depth=tooth_depth,
            teeth_per_vein=2,
            base_xy=base_xy,
            angle_rad=side * spread,
            length=0.68 if side == 0 else 0.6,
            side_offset=rng.uniform(0, 0.5),
        )
        for side, base_xy in zip((-1, 0, 1), bases, strict=True)
    )


OVATE = partial(
    _one_blade, half_width=(0.24, 0.34), rise=(0.45, 0.7), fall=(0.8, 1.15), num_veins=(7, 12),
    vein_angle_deg=(46, 60), vein_arch=(0.2, 0.6), tooth_depth=(0.04, 0.1), teeth_per_vein=(2, 5),
)  # fmt: skip
HEART = partial(
    _one_blade, half_width=(0.34, 0.42), rise=(0.36, 0.46), fall=(0.85, 1.1), num_veins=(6, 9),
    vein_angle_deg=(48, 60), vein_arch=(0.15, 0.4), bend=0.6, sweep=(0.45, 0.7), tooth_depth=(0.03, 0.07),
    teeth_per_vein=(2, 4),
)  # fmt: skip
LANCEOLATE = partial(
    _one_blade, half_width=(0.12, 0.18), rise=(0.6, 0.9), fall=(0.9, 1.2), num_veins=(12, 19),
    vein_angle_deg=(42, 56), vein_arch=(0.4, 1.0), bend=1.6, tooth_depth=(0.05, 0.1),
)  # fmt: skip
OAK = partial(
    _one_blade, half_width=(0.28, 0.36), rise=(0.8, 1.1), fall=(0.45, 0.6), num_veins=(5, 8),
    vein_angle_deg=(60, 70), vein_arch=(0.0, 0.1), lobe_depth=(0.3, 0.55),
)  # fmt: skip


@dataclass(frozen=True)
class LeafKind:
    """Share of pictures with this kind, possible numbers of leaves in a picture, and how one leaf is sampled."""

    share: float
    num_leaves: tuple[int, ...]
    sample_blades: Callable[[np.random.Generator], tuple[Blade, ...]]


LEAF_KINDS = (
    LeafKind(0.28, (1, 1, 1, 2), OVATE),
    LeafKind(0.14, (1, 1, 2), HEART),
    LeafKind(0.16, (2, 3), LANCEOLATE),
    LeafKind(0.14, (1, 1, 2), OAK),
    LeafKind(0.15, (1,), _palmate),
    LeafKind(0.13, (1,), _three_leaflets),
)


def sample_leaves(rng: np.random.Generator) -> list[Leaf]:
    """Return the leaves of one picture, lowest first: all of one kind, each about as long as the picture is wide."""
    shares = [kind.share for kind in LEAF_KINDS]
    kind = LEAF_KINDS[rng.choice(len(LEAF_KINDS), p=np.array(shares) / sum(shares))]
    num_leaves = int(rng.choice(kind.num_leaves))
    heading_rad = rng.uniform(0, 2 * np.pi)
    leaves = []
    for number in np.arange(num_leaves) - (num_leaves - 1) / 2:
        aside = 0.7 * number / num_leaves + rng.normal(0, 0.02)
        ahead = rng.normal(0, 0.04)
        leaf_heading_rad = heading_rad + rng.normal(0, 0.3) * (num_leaves > 1)
        leaf = Leaf(
            blades=kind.sample_blades(rng),
            warp=(Waves.sample(rng, (1.0, 9.0)), Waves.sample(rng, (1.0, 9.0))),
            warp_depth=rng.uniform(0.004, 0.010),
            holes=_sample_holes(rng),
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


def _sample_holes(rng: np.random.Generator) -> tuple[tuple[float, float, float], ...]:
    num_holes = int(rng.integers(1, 7)) if rng.uniform() < 0.25 else 0
    return tuple((rng.uniform(0.2, 0.9), rng.normal(0, 0.14), 0.010 * rng.lognormal(0, 0.6)) for _ in range(num_holes))


@dataclass(frozen=True)
class LeafMaps:
    """A rasterised leaf, all maps (H, W). Values outside of `inside` have no meaning."""

    inside: Mask  # pixels whose centre is on the leaf
    along: Floats  # 0 at the base, 1 at the tip
    margin: Floats  # 0 on the midrib, 1 on the margin
    midrib: Floats  # 0 to 1
    vein: Floats  # 0 to 1, secondary veins
    interveinal: Floats  # 0 on a secondary vein, 1 halfway to the next
    relief: Floats  # height above the picture plane, in picture widths


def draw_leaf(leaf: Leaf, size_px: int) -> LeafMaps:
    """Rasterise a leaf into a picture of `size_px` x `size_px`."""
    x, y = _leaf_frame(leaf, size_px)
    pixel = 1 / (size_px * leaf.length)
    nearest = np.full(x.shape, np.inf)
    maps = {name: np.zeros(x.shape) for name in ("along", "midrib", "vein", "interveinal", "relief")}
    for blade in leaf.blades:
        u, v = _blade_frame(blade, x, y)
        margin = _margin(blade, u, v)
        owned = margin < nearest
        nearest[owned] = margin[owned]
        drawn = _blade_maps(blade, u[owned], v[owned], margin[owned], pixel / blade.length, leaf.quilting)
        for name, values in drawn.items():
            maps[name][owned] = values

    petiole = _petiole(leaf, x, y)
    stalk = (petiole < 1) & (nearest >= 1)
    maps["midrib"][stalk] = 1.0
    maps["vein"][stalk] = maps["along"][stalk] = maps["interveinal"][stalk] = 0.0
    maps["relief"][stalk] += 0.006 * np.sqrt(1 - petiole[stalk] ** 2)
    nearest[stalk] = petiole[stalk] * 0.5
    for along, across, radius in leaf.holes:
        nearest[np.hypot(x - along, y - across) < radius] = OUTSIDE
    maps["relief"] *= leaf.length
    return LeafMaps(inside=nearest < 1, margin=nearest, **maps)


def _leaf_frame(leaf: Leaf, size_px: int) -> tuple[Floats, Floats]:
    """Return the pixel centres in the leaf's frame, (H, W) each: base at (0, 0), tip at (1, 0), irregularly warped."""
    centres = (np.arange(size_px) + 0.5) / size_px
    x, y = np.meshgrid(centres, centres)
    dx, dy = (x - leaf.centre_xy[0]) / leaf.length, (y - leaf.centre_xy[1]) / leaf.length
    cos, sin = np.cos(leaf.heading_rad), np.sin(leaf.heading_rad)
    along, across = cos * dx + sin * dy + 0.5, cos * dy - sin * dx
    warp_along, warp_across = leaf.warp
    return (
        along + leaf.warp_depth * warp_along(along, across),
        across + leaf.warp_depth * warp_across(along, across),
    )


def _blade_frame(blade: Blade, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return u and v of points in the leaf's frame."""
    dx, dy = (x - blade.base_xy[0]) / blade.length, (y - blade.base_xy[1]) / blade.length
    cos, sin = np.cos(blade.angle_rad), np.sin(blade.angle_rad)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    return u, v - blade.bend * u * (u - 1)


def _margin(blade: Blade, u: Floats, v: Floats) -> Floats:
    """Return the margin coordinate: 0 on the midrib, 1 on the margin, more outside."""
    side = np.abs(v)
    outline_u = u + blade.sweep * side * np.clip(1 - u, 0, 1)
    on_axis = (outline_u > 0) & (outline_u < 1)
    outline_u = np.where(on_axis, outline_u, 0.5)
    peak = blade.rise / (blade.rise + blade.fall)
    width = (outline_u / peak) ** blade.rise * ((1 - outline_u) / (1 - peak)) ** blade.fall
    phase = _vein_phase(blade, u, v)
    if blade.lobe_depth:
        fade = np.clip(1.15 - outline_u, 0, 1) ** 0.5
        width = width * (1 - blade.lobe_depth * fade * (0.5 - 0.5 * np.cos(2 * np.pi * phase)) ** 0.8)
    if blade.tooth_depth:
        tooth = np.mod(-phase * blade.teeth_per_vein, 1.0)
        width = width * (1 - blade.tooth_depth * tooth**1.3 * np.clip(8 * outline_u, 0, 1))
    return np.where(on_axis, side / (blade.half_width * np.maximum(width, 1e-6)), OUTSIDE)


def _vein_phase(blade: Blade, u: Floats, v: Floats) -> Floats:
    """Return a phase that grows by 1 from each secondary vein to the next towards the tip; veins are integers."""
    side = np.abs(v)
    lean = side / np.tan(blade.vein_angle_rad) + blade.vein_arch * side**2 / blade.half_width
    origin = u - lean * (1 - 0.25 * u)
    origin = origin + 0.012 * np.sin(23 * origin + 2.1 * np.sign(v)) / max(1.0, blade.num_veins / 8)
    phase: Floats = blade.num_veins * origin + np.where(v > 0, blade.side_offset, 0.0)
    return phase


def _blade_maps(
    blade: Blade, u: Floats, v: Floats, margin: Floats, pixel: float, quilting: float
) -> dict[str, Floats]:
    """Return the maps at points of a blade; u, v and margin (points,). `pixel` is the pixel pitch in blade lengths."""
    phase = _vein_phase(blade, u, v)
    across_vein = np.abs(phase - np.round(phase)) / blade.num_veins * np.sin(blade.vein_angle_rad)
    taper = np.clip(1.0 - u, 0, 1)
    vein = _line(across_vein, 0.0035 * (1.2 - 0.9 * np.clip(margin, 0, 1)) * (0.5 + 0.5 * taper), pixel)
    vein *= np.round(phase) >= 1
    midrib = _line(np.abs(v), 0.009 * (0.25 + 0.75 * taper), pixel)
    interveinal = 0.5 - 0.5 * np.cos(2 * np.pi * phase)

    bulge = np.sqrt(interveinal) * np.clip(margin * 3, 0, 1) * np.clip(1.2 - margin, 0, 1)
    quilted = quilting / blade.num_veins * bulge
    folded = 0.16 * np.abs(v) - 0.55 * v**2 - 0.10 * (u - 0.5) ** 2
    relief = folded + quilted - 0.004 * midrib - 0.0012 * vein
    return {
        "along": np.clip(u, 0, 1),
        "midrib": midrib,
        "vein": vein,
        "interveinal": interveinal,
        "relief": relief * blade.length,
    }


def _line(distance: Floats, half_width: Floats, pixel: float) -> Floats:
    """Return a soft line, 1 in its middle. A line thinner than a pixel is drawn one pixel wide and fainter."""
    drawn = np.sqrt(half_width**2 + (0.45 * pixel) ** 2)
    return half_width / drawn * np.exp(-((distance / drawn) ** 2))


def _petiole(leaf: Leaf, x: Floats, y: Floats) -> Floats:
    """Return 0 in the middle of the petiole, 1 on its edge, more outside."""
    joint = max(blade.base_xy[0] for blade in leaf.blades)
    behind = joint - x
    length = leaf.petiole_length + joint
    half_width = 0.008 + 0.008 * np.clip(behind / length, 0, 1) ** 3
    distance = np.abs(y - leaf.petiole_bend * np.maximum(-x, 0) ** 2) / half_width
    return np.where((behind > -0.02) & (behind < length), distance, OUTSIDE)
