"""Leaf outlines and veins, drawn analytically so that any picture size shows the same leaf.

Pictures span 0 to 1, x to the right and y down. A leaf is one or more blades; in a blade's own frame u runs
along the midrib from base (0) to tip (1) and v across it, both in blade lengths. H, W are pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

OUTSIDE = 9.0


@dataclass(frozen=True)
class Waves:
    """A smooth random field: a sum of plane waves, the same at every resolution."""

    wavevectors: Floats  # (waves, 2), radians per unit length
    phases_rad: Floats
    amplitudes: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, cycles: tuple[float, float], num_waves: int = 6) -> Waves:
        """Waves with `cycles` (from, to) periods per unit length; the field has unit standard deviation."""
        wavenumber = rng.uniform(*cycles, num_waves)
        heading = rng.uniform(0, 2 * np.pi, num_waves)
        vectors = 2 * np.pi * wavenumber[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
        amplitudes = 1 / wavenumber
        amplitudes *= np.sqrt(2 / np.sum(amplitudes**2))
        return cls(vectors, rng.uniform(0, 2 * np.pi, num_waves), amplitudes)

    def __call__(self, x: Floats, y: Floats) -> Floats:
        """The field at points x, y (H, W) that form a regular grid, however turned.

        On such a grid sin(row phase + column phase) is a product of rows and columns.
        """
        kx, ky = self.wavevectors.T
        row_phases = np.outer(x[:, 0], kx) + np.outer(y[:, 0], ky) + self.phases_rad
        column_phases = np.outer(kx, x[0] - x[0, 0]) + np.outer(ky, y[0] - y[0, 0])
        field: Floats = (self.amplitudes * np.sin(row_phases)) @ np.cos(column_phases)
        field += (self.amplitudes * np.cos(row_phases)) @ np.sin(column_phases)
        return field


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
    sweep: float = 0.0  # how far the margin reaches back behind the base: heart-shaped when positive
    lobe_depth: float = 0.0
    tooth_depth: float = 0.0
    teeth_per_vein: int = 1
    side_offset: float = 0.0  # by how much the veins of the left side are set off, in vein distances
    base_xy: tuple[float, float] = (0.0, 0.0)
    angle_rad: float = 0.0
    length: float = 1.0


@dataclass(frozen=True)
class Leaf:
    """A leaf laid into the picture: where its base lies, where it points and how long it is (picture widths)."""

    blades: tuple[Blade, ...]
    warp: tuple[Waves, Waves]
    warp_depth: float
    eaten: tuple[tuple[float, float, float], ...]  # holes: place along and across, radius; leaf lengths
    quilting: float  # how far the blade bulges between its veins
    petiole_length: float
    petiole_bend: float
    centre_xy: tuple[float, float]
    heading_rad: float
    length: float

    def scaled(self, factor: float) -> Leaf:
        """The same leaf, `factor` times as large, about the same centre."""
        return replace(self, length=self.length * factor)


@dataclass(frozen=True)
class LeafMaps:
    """What a leaf looks like to its tissue, all (H, W). Values outside `inside` mean nothing."""

    inside: Mask
    along: Floats  # 0 at the base, 1 at the tip
    margin: Floats  # 0 on the midrib, 1 on the margin
    midrib: Floats  # 0 to 1
    vein: Floats  # 0 to 1, secondary veins
    interveinal: Floats  # 0 on a secondary vein, 1 halfway to the next
    relief: Floats  # height above the picture plane, in picture widths


def pixel_centres(size_px: int) -> tuple[Floats, Floats]:
    """x and y of every pixel centre, (H, W) each."""
    centres = (np.arange(size_px) + 0.5) / size_px
    x, y = np.meshgrid(centres, centres)
    return x, y


def draw_leaf(leaf: Leaf, size_px: int) -> LeafMaps:
    """Rasterises a leaf into a picture of `size_px` squared."""
    x, y = _leaf_frame(leaf, *pixel_centres(size_px))
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
    nearest[_eaten(leaf, x, y)] = OUTSIDE
    maps["relief"] *= leaf.length
    return LeafMaps(inside=nearest < 1, margin=nearest, **maps)


def leaf_mask(leaf: Leaf, size_px: int) -> Mask:
    """The (H, W) pixels whose centre lies on the leaf; equal to `draw_leaf(...).inside`, and faster."""
    x, y = _leaf_frame(leaf, *pixel_centres(size_px))
    inside = _petiole(leaf, x, y) < 1
    for blade in leaf.blades:
        inside |= _margin(blade, *_blade_frame(blade, x, y)) < 1
    return inside & ~_eaten(leaf, x, y)


def _leaf_frame(leaf: Leaf, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Picture to leaf: base at 0, 0, pointing to 1, 0, with the growth's small irregularities undone."""
    dx, dy = (x - leaf.centre_xy[0]) / leaf.length, (y - leaf.centre_xy[1]) / leaf.length
    cos, sin = np.cos(leaf.heading_rad), np.sin(leaf.heading_rad)
    along, across = cos * dx + sin * dy + 0.5, cos * dy - sin * dx
    warp_along, warp_across = leaf.warp
    return (
        along + leaf.warp_depth * warp_along(along, across),
        across + leaf.warp_depth * warp_across(along, across),
    )


def _blade_frame(blade: Blade, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    dx, dy = (x - blade.base_xy[0]) / blade.length, (y - blade.base_xy[1]) / blade.length
    cos, sin = np.cos(blade.angle_rad), np.sin(blade.angle_rad)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    return u, v - blade.bend * u * (u - 1)


def _margin(blade: Blade, u: Floats, v: Floats) -> Floats:
    """0 on the midrib, 1 on the margin, more outside."""
    side = np.abs(v)
    outline_u = u + blade.sweep * side * np.clip(1 - u, 0, 1)
    on_axis = (outline_u > 0) & (outline_u < 1)
    position = np.where(on_axis, outline_u, 0.5)
    peak = blade.rise / (blade.rise + blade.fall)
    width = (position / peak) ** blade.rise * ((1 - position) / (1 - peak)) ** blade.fall
    phase = _vein_phase(blade, u, v)
    if blade.lobe_depth:
        fade = np.clip(1.15 - position, 0, 1) ** 0.5
        width = width * (1 - blade.lobe_depth * fade * (0.5 - 0.5 * np.cos(2 * np.pi * phase)) ** 0.8)
    if blade.tooth_depth:
        tooth = np.mod(-phase * blade.teeth_per_vein, 1.0)
        width = width * (1 - blade.tooth_depth * tooth**1.3 * np.clip(8 * position, 0, 1))
    return np.where(on_axis, side / (blade.half_width * np.maximum(width, 1e-6)), OUTSIDE)


def _vein_phase(blade: Blade, u: Floats, v: Floats) -> Floats:
    """Grows by 1 from each secondary vein to the next towards the tip; whole numbers are veins."""
    side = np.abs(v)
    lean = side / np.tan(blade.vein_angle_rad) + blade.vein_arch * side**2 / blade.half_width
    origin = u - lean * (1 - 0.25 * u)
    origin = origin + 0.012 * np.sin(23 * origin + 2.1 * np.sign(v)) / max(1.0, blade.num_veins / 8)
    phase: Floats = blade.num_veins * origin + np.where(v > 0, blade.side_offset, 0.0)
    return phase


def _blade_maps(
    blade: Blade, u: Floats, v: Floats, margin: Floats, pixel: float, quilting: float
) -> dict[str, Floats]:
    """Maps at points of a blade, u, v and margin (points,). `pixel` is the pixel pitch in blade lengths."""
    phase = _vein_phase(blade, u, v)
    across_vein = np.abs(phase - np.round(phase)) / blade.num_veins * np.sin(blade.vein_angle_rad)
    taper = np.clip(1 - u, 0.0, 1)
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
    """A soft line, 1 in its middle; one thinner than a pixel is drawn a pixel wide and fainter."""
    drawn = np.sqrt(half_width**2 + (0.45 * pixel) ** 2)
    return half_width / drawn * np.exp(-((distance / drawn) ** 2))


def _petiole(leaf: Leaf, x: Floats, y: Floats) -> Floats:
    """0 in the middle of the stalk, 1 on its edge, more outside."""
    joint = max(blade.base_xy[0] for blade in leaf.blades)
    behind = joint - x
    length = leaf.petiole_length + joint
    half_width = 0.008 + 0.008 * np.clip(behind / length, 0, 1) ** 3
    distance = np.abs(y - leaf.petiole_bend * np.maximum(-x, 0) ** 2) / half_width
    return np.where((behind > -0.02) & (behind < length), distance, OUTSIDE)


def _eaten(leaf: Leaf, x: Floats, y: Floats) -> Mask:
    holes = np.zeros(x.shape, dtype=bool)
    for along, across, radius in leaf.eaten:
        holes |= np.hypot(x - along, y - across) < radius
    return holes
