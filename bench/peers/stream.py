"""What every contender offers, and the tiles that all of them store: 12 bits, smooth with a little noise."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

TILE_PX, BANDS, BATCH, SHARDS, SCALE = 256, 5, 32, 16, 1e-4
TILE_SHAPE = (BANDS, TILE_PX, TILE_PX)
Batch = tuple[Tensor, Tensor]
"""Tiles (B, C, H, W) and leaf masks (B, H, W) or (B, 1, H, W), both on the device."""


class Stream(ABC):
    """One contender's loader on a folder that it wrote itself; with a saved `state` it goes on from there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._floats = torch.empty((BATCH, *TILE_SHAPE), device=device)

    @abstractmethod
    def integers(self) -> Iterator[Batch]:
        """One epoch in training order, in the stored integers; the next call goes on with the next epoch."""

    def floats(self) -> Iterator[Batch]:
        """The same in reflectance: the main process converts, into memory that it keeps, the fastest way torch has."""
        for stored, masks in self.integers():
            yield self._floats[: len(stored)].copy_(stored).mul_(SCALE), masks

    @abstractmethod
    def state(self) -> Any:
        """What the documented way of resuming saves after the batch that came last."""


def make_tile(row: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Tile (C, H, W) and leaf mask (H, W). The first pixel holds `row`, so that any batch tells which tiles it has."""
    random = np.random.default_rng(row)
    slope = np.add.outer(np.arange(TILE_PX), np.arange(TILE_PX)) * (1 + row % 5)
    tile = (slope + random.integers(0, 128, TILE_SHAPE)).astype(np.uint16)
    tile[0, 0, 0] = row
    centre = TILE_PX // 2 + row % 32
    down, right = np.ogrid[:TILE_PX, :TILE_PX]
    return tile, (down - centre) ** 2 + (right - centre) ** 2 < (TILE_PX // 3) ** 2


def rows_of(tiles: Tensor) -> list[int]:
    """Which tiles a batch holds, whether it came as integers or as reflectance."""
    first_pixel = tiles[:, 0, 0, 0].cpu().double()
    return [round(value / SCALE if tiles.is_floating_point() else value) for value in first_pixel.tolist()]


def rows_per_shard(num_tiles: int) -> list[range]:
    """The tiles of each of the 16 shards."""
    edges = [num_tiles * shard // SHARDS for shard in range(SHARDS + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def encode_mask(leaf_mask: NDArray[np.bool_]) -> bytes:
    """A 1-bit PNG."""
    buffer = io.BytesIO()
    Image.fromarray(leaf_mask).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_mask(png: bytes) -> NDArray[np.bool_]:
    """Leaf mask (H, W) of a 1-bit PNG."""
    return np.array(Image.open(io.BytesIO(png)))
