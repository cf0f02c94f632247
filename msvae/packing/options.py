"""What packing is asked to do, and what it says it has done."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msvae.bands import Bands
from msvae.rasters.options import ReadOptions
from msvae.shards.sample_codec import Compression
from msvae.shards.splits import SPLITS as SPLITS

TILE_STEP_PX = 8
"""The backbone halves a tile three times."""


@dataclass(frozen=True)
class PackOptions(ReadOptions):
    """How rasters become shards.

    Raises: ValueError for a value that cannot be met.
    """

    tile_px: int = 256
    """Side of a tile in pixels."""
    tiling: Literal["grid", "leaf"] = "grid"
    """Where tiles lie: a regular grid, or as few as cover 99 % of the leaf pixels."""
    stride_px: int | None = None
    """Pixels from tile to tile of the grid; None is the side of a tile, less lets tiles overlap."""
    min_coverage: float = 0.1
    """Least share of leaf pixels in a tile."""
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares of tiles for train, val and test."""
    split_by: Literal["auto", "image", "block"] = "auto"
    """What stays together: whole images, or blocks of neighbouring tiles; auto needs three images for the former."""
    group_by: str | None = None
    """Pattern found in the path of every image; images in which its first group, else all of it, is the same (a
    plant) stay together. Goes before `split_by`."""
    block_tiles: int | None = None
    """Side of a block in tiles; None makes about sixteen blocks."""
    gap_px: int = 0
    """Least distance of tiles of different splits in one image. At 0 they may touch but share no pixel; more drops
    every tile that lies nearer, a third of a small field already at 1."""
    seed: int = 0
    """Decides which images or blocks go where."""
    tiles_per_shard: int = 128
    """Most tiles in one tar."""
    compression: Compression = "none"
    """`delta-blosc2` stores tiles compressed: smaller, and faster where storage is slow."""
    overwrite: bool = False
    """Replace an earlier data set at the same place, once the new one is complete."""
    num_workers: int | None = 1
    """Processes that read and write at the same time; None is one a CPU core, or fewer where there is little to do."""
    part: tuple[int, int] | None = None
    """(i, n): make the i-th of n parts of the shards, counted from 1, and leave the manifests to `merge`."""
    merge: bool = False
    """Complete the data set whose parts were made before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile_px < TILE_STEP_PX or self.tile_px % TILE_STEP_PX:
            raise ValueError(
                f"got --tile {self.tile_px}, expected a multiple of {TILE_STEP_PX} (the backbone reduces "
                f"8x); give {max(TILE_STEP_PX, round(self.tile_px / TILE_STEP_PX) * TILE_STEP_PX)}"
            )
        if not 0 <= self.min_coverage <= 1:
            raise ValueError(f"got --min-coverage {self.min_coverage}, expected a share from 0 to 1")
        shares_fit = len(self.split) == 3 and min(self.split) >= 0 and math.isclose(sum(self.split), 1)
        if not shares_fit or self.split[0] == 0:
            raise ValueError(
                f"got --split {' '.join(map(str, self.split))}, expected three shares for train, val and test "
                "that add up to 1, the first above 0, such as 0.7 0.15 0.15"
            )
        if self.split_by not in ("auto", "image", "block"):
            raise ValueError(f"got --split-by {self.split_by}, expected auto, image or block")
        for name in ("block_tiles", "tiles_per_shard", "num_workers", "stride_px"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"got {name} {value}, expected 1 or more")
        self._check_tiling_and_split()
        self._check_parts()

    def _check_tiling_and_split(self) -> None:
        if self.tiling not in ("grid", "leaf"):
            raise ValueError(f"got --tiling {self.tiling}, expected grid or leaf")
        if self.stride_px is not None and self.tiling != "grid":
            raise ValueError("got --stride with --tiling leaf, which finds places itself; give one of them")
        if self.gap_px < 0:
            raise ValueError(f"got --gap-px {self.gap_px}, expected 0 or more")
        if self.group_by is None:
            return
        if self.split_by != "auto":
            raise ValueError(f"got --group-by and --split-by {self.split_by}; give one of them")
        try:
            re.compile(self.group_by)
        except re.error as error:
            raise ValueError(f"got --group-by {self.group_by}, which is no regular expression: {error}") from error

    def _check_parts(self) -> None:
        if self.part is None:
            return
        number, num_parts = self.part
        if not 1 <= number <= num_parts:
            raise ValueError(f"got --part {number}/{num_parts}, expected 1/{num_parts} to {num_parts}/{num_parts}")
        if self.merge:
            raise ValueError("got --part and --merge; give --merge once, after all parts")


@dataclass(frozen=True)
class PackSummary:
    """What packing made. Dictionaries by split hold only splits that were written."""

    out: Path
    num_images: int
    bands: Bands
    dtype: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    tile_px: int
    split_by: str
    tiles: dict[str, int]
    leaf_pixels: dict[str, int]
    num_shards: dict[str, int]
    coverage_mean: float
    """Mean share of leaf pixels over the tiles of all splits."""
    dropped: dict[str, int]
    """Tiles (or whole images) left out, by reason."""
    num_in_gap: int
    """Of the dropped ones, those too near to another split."""
    leaf_pixels_in_images: int
    """Of all images, in tiles or not."""
    leaf_pixels_covered: int
    """Of those, in at least one tile that was kept or left out for the gap."""
    leaf_pixels_repeated: int
    """How often such tiles hold a leaf pixel that another holds too, where they overlap."""
    shards_missing: int
    """Shards that other parts have yet to make; until then there is no output."""
    num_bytes: int
    notices: tuple[str, ...]
    """What was assumed or left out, a line each."""
