"""What is drawn when it is asked how sure a number is: images, or parts of one where there is only one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from msvae.shards.splits import TileOrigin

MAX_UNITS = 1000
"""Beyond, several images share a place, which keeps memory small and intervals as they are."""
FEW_UNITS = 10


@dataclass(frozen=True)
class Units:
    """Of every tile in stored order its image, its group and what is drawn with it, as numbers from 0."""

    images: list[str]
    image_of_tile: NDArray[np.int64]
    groups: list[str]
    group_of_tile: NDArray[np.int64]
    kind: str
    """What is drawn: an `image`, a `block` of one, or a `tile`."""
    drawn_of_tile: NDArray[np.int64]
    num_drawn: int

    @property
    def num_units(self) -> int:
        """Places for what is drawn."""
        return min(self.num_drawn, MAX_UNITS)

    @cached_property
    def unit_of_tile(self) -> NDArray[np.int64]:
        """The place of each tile."""
        return self.drawn_of_tile % self.num_units


def units_of(origins: Sequence[TileOrigin]) -> Units:
    """Images are drawn. Where there is one alone its blocks are, else its tiles, which are less independent."""
    images, image_of_tile = _numbered([origin.image for origin in origins])
    groups, group_of_tile = _numbered([origin.group for origin in origins])
    kind, of_tile = "image", image_of_tile
    if len(images) == 1:
        kind, of_tile = ("block", group_of_tile) if len(groups) > 1 else ("tile", np.arange(len(origins)))
    return Units(images, image_of_tile, groups, group_of_tile, kind, of_tile, int(of_tile.max()) + 1)


def _numbered(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Different names by first appearance, and the number of each."""
    number_of: dict[str, int] = {}
    numbers = [number_of.setdefault(name, len(number_of)) for name in names]
    return list(number_of), np.array(numbers, np.int64)
