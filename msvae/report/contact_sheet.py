"""A contact sheet: one picture of many tiles with leaf outline, key and coverage."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from msvae.bands import Bands
from msvae.report.composites import GAMMA, STRETCH_PERCENTILES, Composite, composites

LabelledTile = tuple[str, NDArray[np.float32], NDArray[np.bool_]]
"""Key, reflectance (C, H, W) and leaf mask (H, W) of a tile."""

TILE_SIDE = 192
GAP, LABEL_HEIGHT, TITLE_HEIGHT, FONT_SIZE = 12, 44, 44, 12
OUTLINE = np.array([255, 0, 200], np.uint8)
INK, FAINT_INK, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)


@dataclass(frozen=True)
class Thumbnail:
    """A tile, resized for display."""

    key: str
    coverage: float
    """Share of leaf pixels."""
    colour: NDArray[np.float32]
    """Reflectance of three bands, (H, W, 3)."""
    leaf_mask: NDArray[np.bool_]
    """Leaf mask (H, W)."""

    @classmethod
    def from_tile(cls, tile: LabelledTile, composite: Composite) -> Thumbnail:
        """Resize a tile: pixels of small tiles are repeated, those of large tiles are averaged."""
        key, reflectance, leaf_mask = tile
        size, enlarges = (TILE_SIDE, TILE_SIDE), leaf_mask.shape[0] < TILE_SIDE
        how = Image.Resampling.NEAREST if enlarges else Image.Resampling.BOX
        channels = [
            np.asarray(Image.fromarray(np.ascontiguousarray(reflectance[band], np.float32)).resize(size, how))
            for band in composite.band_indices
        ]
        leaf = np.asarray(Image.fromarray(leaf_mask).resize(size, Image.Resampling.NEAREST))
        return cls(key, float(leaf_mask.mean()), np.stack(channels, axis=-1), leaf)

    def draw(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> Image.Image:
        """Return the picture with the leaf outline. Each band is stretched from its `low` to its `high`."""
        colour = (self.colour - low) / np.maximum(high - low, 1e-6)
        colour = np.nan_to_num(colour, nan=1.0, posinf=1.0, neginf=0.0)
        pixels = (np.clip(colour, 0, 1) ** GAMMA * 255).round().astype(np.uint8)
        pixels[_edge(self.leaf_mask)] = OUTLINE
        return Image.fromarray(pixels)


def contact_sheet(sections: Sequence[tuple[str, Iterable[LabelledTile]]], bands: Bands, columns: int = 6) -> bytes:
    """Return a PNG file with a heading and a grid of tiles per section. Equal tiles result in equal bytes.

    All tiles share one stretch, so that they can be compared.
    """
    composite = composites(bands)[0]
    grids = [(title, [Thumbnail.from_tile(tile, composite) for tile in tiles]) for title, tiles in sections]
    low, high = _stretch([thumbnail for _, grid in grids for thumbnail in grid], composite)
    row_height = TILE_SIDE + LABEL_HEIGHT
    heights = [TITLE_HEIGHT + -(-len(grid) // columns) * row_height for _, grid in grids]
    sheet = Image.new("RGB", (GAP + columns * (TILE_SIDE + GAP), sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (title, grid), height in zip(grids, heights, strict=True):
        heading = f"{title}  ·  {composite.name}, leaf outlined"
        draw.text((GAP, top + 14), heading, INK, ImageFont.load_default(FONT_SIZE + 6))
        for i, thumbnail in enumerate(grid):
            left, tile_top = GAP + i % columns * (TILE_SIDE + GAP), top + TITLE_HEIGHT + i // columns * row_height
            sheet.paste(thumbnail.draw(low, high), (left, tile_top))
            _label(draw, left, tile_top + TILE_SIDE + 2, thumbnail.key, f"coverage {thumbnail.coverage:.2f}")
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _stretch(thumbnails: Sequence[Thumbnail], composite: Composite) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the low and the high end of the stretch of each band; true colour has one stretch for all bands."""
    pixels_P3 = np.concatenate([thumbnail.colour.reshape(-1, 3) for thumbnail in thumbnails])
    is_finite_P3 = np.isfinite(pixels_P3)
    if not is_finite_P3.all():
        pixels_P3 = pixels_P3[is_finite_P3.all(axis=1)]
    if not len(pixels_P3):
        return np.zeros(3), np.ones(3)
    low, high = np.percentile(pixels_P3, STRETCH_PERCENTILES, axis=None if composite.shared_stretch else 0)
    return np.broadcast_to(low, 3), np.broadcast_to(high, 3)


def _edge(leaf: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return True for leaf pixels next to background. The border of the tile is not an edge."""
    padded = np.pad(leaf, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: NDArray[np.bool_] = leaf & ~inside
    return edge


def _label(draw: ImageDraw.ImageDraw, left: int, top: int, key: str, coverage: str) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    while draw.textlength(key, font) > TILE_SIDE:  # keys of tiles of one image differ only at the end
        key = "…" + key.lstrip("…")[1:]
    draw.text((left, top), key, INK, font)
    draw.text((left, top + FONT_SIZE + 3), coverage, FAINT_INK, font)
