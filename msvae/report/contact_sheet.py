"""Many tiles on one picture: a composite of three bands each, its leaf outlined, key and coverage below."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from msvae.bands import Bands
from msvae.report.pictures import GAMMA, STRETCH_PERCENTILES, Composite, composites

LabelledTile = tuple[str, NDArray[np.float32], NDArray[np.bool_]]
"""Key, reflectance (C, H, W), leaf mask (H, W)."""

TILE_SIDE = 192
GAP, LABEL_HEIGHT, TITLE_HEIGHT, FONT_SIZE = 12, 44, 44, 12
OUTLINE = np.array([255, 0, 200], np.uint8)
INK, FAINT_INK, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)


def contact_sheet(sections: Sequence[tuple[str, Sequence[LabelledTile]]], bands: Bands, columns: int = 6) -> bytes:
    """A PNG with a heading and a grid of tiles for each section. The same tiles give the same bytes.

    One stretch, of the leaf pixels on the sheet, serves all tiles, so that they compare.
    """
    tiles = [tile for _, section in sections for tile in section]
    composite = composites(bands)[0]
    low, high = _stretch(tiles, composite)
    row_height = TILE_SIDE + LABEL_HEIGHT
    heights = [TITLE_HEIGHT + -(-len(section) // columns) * row_height for _, section in sections]
    sheet = Image.new("RGB", (GAP + columns * (TILE_SIDE + GAP), sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (title, section), height in zip(sections, heights, strict=True):
        heading = f"{title}  ·  {composite.name}, leaf outlined"
        draw.text((GAP, top + 14), heading, INK, ImageFont.load_default(FONT_SIZE + 6))
        for i, (key, reflectance, leaf_mask) in enumerate(section):
            left, tile_top = GAP + i % columns * (TILE_SIDE + GAP), top + TITLE_HEIGHT + i // columns * row_height
            sheet.paste(_picture(reflectance, leaf_mask, composite, low, high), (left, tile_top))
            _label(draw, left, tile_top + TILE_SIDE + 2, key, f"coverage {leaf_mask.mean():.2f}")
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _stretch(tiles: Sequence[LabelledTile], composite: Composite) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high of each channel; true colour shares one, so that leaves are green."""
    channels = list(composite.channels)
    leaf_CP = np.concatenate([reflectance[channels][:, mask] for _, reflectance, mask in tiles], axis=1)
    leaf_CP = leaf_CP[:, np.isfinite(leaf_CP).all(axis=0)]
    if leaf_CP.shape[1] == 0:
        return np.zeros(3), np.ones(3)
    axis = None if composite.shared_stretch else 1
    low, high = np.percentile(leaf_CP, STRETCH_PERCENTILES, axis=axis)
    return np.broadcast_to(low, 3), np.broadcast_to(high, 3)


def _picture(
    reflectance: NDArray[np.float32],
    leaf_mask: NDArray[np.bool_],
    composite: Composite,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> Image.Image:
    colour = reflectance[list(composite.channels)].transpose(1, 2, 0).astype(np.float64)
    colour = np.nan_to_num((colour - low) / np.maximum(high - low, 1e-6), nan=1.0, posinf=1.0, neginf=0.0)
    pixels = (np.clip(colour, 0, 1) ** GAMMA * 255).round().astype(np.uint8)
    size = (TILE_SIDE, TILE_SIDE)
    enlarges = leaf_mask.shape[0] < TILE_SIDE
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST if enlarges else Image.Resampling.BOX)
    leaf = np.asarray(Image.fromarray(leaf_mask).resize(size, Image.Resampling.NEAREST))
    outlined = np.array(picture)
    outlined[_edge(leaf)] = OUTLINE
    return Image.fromarray(outlined)


def _edge(leaf: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leaf pixels with a neighbour that is not; the border of the tile is no edge."""
    padded = np.pad(leaf, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: NDArray[np.bool_] = leaf & ~inside
    return edge


def _label(draw: ImageDraw.ImageDraw, left: int, top: int, key: str, coverage: str) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    while draw.textlength(key, font) > TILE_SIDE:  # the end of a key tells tiles of one image apart
        key = "…" + key.lstrip("…")[1:]
    draw.text((left, top), key, INK, font)
    draw.text((left, top + FONT_SIZE + 3), coverage, FAINT_INK, font)
