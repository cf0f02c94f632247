"""Interface of every compared loader, and the tiles that all of them store: leaves as seen by a 12-bit camera."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

TILE_PX, BANDS, BATCH, SHARDS = 256, 5, 32, 16
FULL_SCALE = 4095
SCALE = 1 / FULL_SCALE
TILE_SHAPE = (BANDS, TILE_PX, TILE_PX)
Batch = tuple[Tensor, Tensor]
"""Tiles (B, C, H, W) and leaf masks (B, H, W) or (B, 1, H, W), both on the device."""


class Stream(ABC):
    """A loader of a folder that its own module has written. It resumes if it receives a saved `state`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._floats = torch.empty((BATCH, *TILE_SHAPE), device=device)

    @abstractmethod
    def integers(self) -> Iterator[Batch]:
        """Yield one epoch of stored integers in training order; the next call continues with the next epoch."""

    def floats(self) -> Iterator[Batch]:
        """Yield the same as reflectance. The main process converts into preallocated memory, the fastest way."""
        for stored, masks in self.integers():
            yield self._floats[: len(stored)].copy_(stored).mul_(SCALE), masks

    @abstractmethod
    def state(self) -> Any:
        """Return the state that the documentation of the loader tells users to save in order to resume."""


NUM_PICTURES, PICTURE_PX = 32, 288
LEAF_REFLECTANCE = np.array([0.05, 0.14, 0.05, 0.37, 0.45])
SOIL_REFLECTANCE = np.array([0.12, 0.14, 0.17, 0.20, 0.24])
READ_NOISE, SHOT_VARIANCE = 3.0, 0.25
"""In counts, and in squared counts per count: a standard deviation of 5 to 20 counts."""


def make_tile(row: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Return a tile (C, H, W) in counts of a 12-bit camera, and a leaf mask (H, W) that covers 30 to 90 %.

    The tile is a crop, possibly mirrored, of one of 32 pictures: a lobed leaf with shading and veins on soil, with
    sensor noise that grows with brightness. Loaders therefore decode realistic data: these tiles compress as well as
    pictures of 12-bit cameras (pcodec 2.4 times, JPEG XL 2.4, PNG 1.8), and a mask has 0.8 kB. There are only 32
    pictures because sampling noise is slow; no loader here benefits from that. The first pixel holds `row`, so that
    the tiles of any batch can be identified.
    """
    random = np.random.default_rng(row)
    picture, covered = _picture(row % NUM_PICTURES)
    down, right = random.integers(0, PICTURE_PX - TILE_PX, 2, endpoint=True)
    crop = (..., slice(down, down + TILE_PX), slice(right, right + TILE_PX))
    flip = (..., slice(None, None, random.choice([-1, 1])), slice(None, None, random.choice([-1, 1])))
    tile, leaf_mask = picture[crop][flip].copy(), covered[crop][flip].copy()
    tile[0, 0, 0] = row
    return tile, leaf_mask


@cache
def _picture(number: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    random = np.random.default_rng([number])
    down, right = np.mgrid[:PICTURE_PX, :PICTURE_PX] / PICTURE_PX - 0.5
    angle, distance = np.arctan2(down, right), np.hypot(down, random.uniform(1, 1.6) * right)
    lobes = 1 + random.uniform(0, 0.25) * np.cos(random.integers(3, 8) * angle + random.uniform(0, 6))
    outline = distance / lobes
    covered = outline < np.quantile(outline, random.uniform(0.26, 0.74))
    side_veins = np.sin(random.uniform(30, 60) * (down + np.abs(right))) ** 2
    veins = np.exp(-((right / 0.01) ** 2)) + 0.5 * np.exp(-side_veins / 0.02)
    leaf = (1 + 0.15 * _cloud(random, 2.5)) * (1 + 0.15 * veins)
    soil = 1 + 0.25 * _cloud(random, 2.0)
    reflectance = np.where(
        covered, np.multiply.outer(LEAF_REFLECTANCE, leaf), np.multiply.outer(SOIL_REFLECTANCE, soil)
    )
    counts = FULL_SCALE * np.clip(reflectance, 0, 1)
    counts += np.sqrt(READ_NOISE**2 + SHOT_VARIANCE * counts) * random.standard_normal(counts.shape)
    return np.clip(counts.round(), 0, FULL_SCALE).astype(np.uint16), covered


def _cloud(random: np.random.Generator, slope: float) -> NDArray[np.float64]:
    """Return a texture (H, W) of mean 0 and standard deviation 1 with amplitudes proportional to frequency**-slope."""
    cycles = np.hypot(*np.meshgrid(*[np.fft.fftfreq(PICTURE_PX, 1 / PICTURE_PX)] * 2))
    amplitude = np.where(cycles > 0, np.maximum(cycles, 1) ** -slope, 0)
    texture = np.fft.ifft2(amplitude * np.fft.fft2(random.standard_normal(cycles.shape))).real
    return np.asarray(texture / texture.std())


def rows_of(tiles: Tensor) -> list[int]:
    """Return the rows of the tiles in a batch of integers or of reflectance."""
    first_pixel = tiles[:, 0, 0, 0].cpu().double()
    return [round(value / SCALE if tiles.is_floating_point() else value) for value in first_pixel.tolist()]


def rows_per_shard(num_tiles: int) -> list[range]:
    """Return the rows of the tiles of each of the 16 shards."""
    edges = [num_tiles * shard // SHARDS for shard in range(SHARDS + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def encode_mask(leaf_mask: NDArray[np.bool_]) -> bytes:
    """Return the mask as a 1-bit PNG."""
    buffer = io.BytesIO()
    Image.fromarray(leaf_mask).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_mask(png: bytes) -> NDArray[np.bool_]:
    """Return the leaf mask (H, W) of a 1-bit PNG."""
    return np.array(Image.open(io.BytesIO(png)))
