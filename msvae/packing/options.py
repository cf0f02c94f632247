"""Options of `msvae pack`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from msvae.options import CliOption
from msvae.rasters.options import ReadOptions
from msvae.shards.manifest import TILE_STEP_PX
from msvae.shards.sample_codec import Compression


def _multiple_of_8(tile_px: int) -> int:
    if tile_px < TILE_STEP_PX or tile_px % TILE_STEP_PX:
        nearest = max(TILE_STEP_PX, round(tile_px / TILE_STEP_PX) * TILE_STEP_PX)
        raise ValueError(f"expected a multiple of {TILE_STEP_PX} (the backbone reduces 8x); give {nearest}")
    return tile_px


def _shares(split: tuple[float, float, float]) -> tuple[float, float, float]:
    if min(split) < 0 or not math.isclose(sum(split), 1) or split[0] == 0:
        raise ValueError(
            "expected three shares for train, val and test that add up to 1, the first above 0, such as 0.7 0.15 0.15"
        )
    return split


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError("expected a share from 0 to 1")
    return value


def _part(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None:
        raise ValueError("expected two numbers such as 1/8")
    return int(match[1]), int(match[2])


class PackOptions(ReadOptions):
    """How rasters become shards.

    Raises: ValueError, in one line, if a value is invalid.
    """

    tile_px: Annotated[int, AfterValidator(_multiple_of_8), CliOption("Tiles", "--tile")] = 256
    """Side of a tile in pixels, a multiple of 8."""
    tiling: Annotated[Literal["grid", "leaf"], CliOption("Tiles")] = "grid"
    """Regular grid, or as few tiles as cover 99 % of the leaf."""
    stride_px: Annotated[int | None, Field(ge=1), CliOption("Tiles", "--stride")] = None
    """Pixels from tile to tile of the grid; tiles overlap if it is less than --tile."""
    min_coverage: Annotated[float, AfterValidator(_share), CliOption("Tiles")] = 0.1
    """Smallest share of leaf pixels in a tile."""
    split: Annotated[tuple[float, float, float], AfterValidator(_shares), CliOption("Split")] = (0.7, 0.15, 0.15)
    """Shares of tiles for train, val and test."""
    split_by: Annotated[Literal["auto", "image", "block"], CliOption("Split")] = "auto"
    """Unit that stays in one split; auto is image for three images or more, else block."""
    group_by: Annotated[str | None, CliOption("Split", metavar="REGEX")] = None
    """Images with the same match in their path stay in one split: 'plant_([0-9]+)'."""
    block_tiles: Annotated[int | None, Field(ge=1)] = None
    """Side of a block in tiles; None makes about sixteen blocks."""
    gap_px: Annotated[int, Field(ge=0), CliOption("Split")] = 0
    """Smallest distance between tiles of different splits in an image; nearer tiles are dropped."""
    seed: Annotated[int, Field(ge=0), CliOption("Split")] = 0
    """Seed of the assignment of images or blocks to splits."""
    tiles_per_shard: Annotated[int, Field(ge=1)] = 128
    """Largest number of tiles in one tar."""
    compression: Annotated[Compression, CliOption("Output", "--compress", flag_value="delta-blosc2")] = "none"
    """Store tiles compressed, without loss."""
    num_workers: Annotated[int | None, Field(ge=1), CliOption("Output", "--workers", default=None)] = 1
    """Number of processes. None (the default of the command) is one per CPU core, or fewer for little data."""
    part: Annotated[tuple[int, int] | None, BeforeValidator(_part), CliOption("Output", metavar="I/N")] = None
    """Make only this part of the shards: 1/8 to 8/8 in a job array."""
    merge: Annotated[bool, CliOption("Output")] = False
    """Complete the dataset after all parts are made."""
    overwrite: Annotated[bool, CliOption("Output")] = False
    """Replace an earlier dataset once the new one is complete."""

    @model_validator(mode="after")
    def _check_packing(self) -> PackOptions:
        if self.stride_px is not None and self.tiling != "grid":
            raise ValueError("got --stride with --tiling leaf, which chooses tile positions itself; give one of them")
        if self.group_by is not None:
            if self.split_by != "auto":
                raise ValueError(f"got --group-by and --split-by {self.split_by}; give one of them")
            try:
                re.compile(self.group_by)
            except re.error as error:
                raise ValueError(
                    f"got --group-by {self.group_by}, which is not a regular expression: {error}"
                ) from error
        if self.part is not None:
            number, num_parts = self.part
            if not 1 <= number <= num_parts:
                raise ValueError(f"got --part {number}/{num_parts}, expected 1/{num_parts} to {num_parts}/{num_parts}")
            if self.merge:
                raise ValueError("got --part and --merge; give --merge once, after all parts")
        return self
