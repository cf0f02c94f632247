"""Whole-image leaf masks on disk, one bit a pixel: small objects removed and borders eroded, strip by strip.

The results are those of the whole image at once. In memory is a strip, and a few numbers for every object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

STRIP_PX = 2**20
"""Pixels of a strip; each takes some twenty bytes while objects are found."""


@dataclass(frozen=True)
class BitMask:
    """A leaf mask (H, W) in a file."""

    file: Path
    height: int
    width: int

    @classmethod
    def write(cls, file: Path, width: int, strips: Iterable[NDArray[np.bool_]]) -> BitMask:
        """Spool full-width strips, from the top to the bottom."""
        height = 0
        with file.open("wb") as opened:
            for strip in strips:
                opened.write(np.packbits(strip, axis=1).tobytes())
                height += len(strip)
        return cls(file, height, width)

    def read(self, row: int, col: int, height: int, width: int) -> NDArray[np.bool_]:
        """A window (H, W)."""
        row_bytes = -(-self.width // 8)
        # mapped anew each time: pages of a map that stays count as memory of the process
        packed = np.memmap(self.file, np.uint8, "r", shape=(self.height, row_bytes))
        first, last = col // 8, -(-(col + width) // 8)
        bits = np.unpackbits(packed[row : row + height, first:last], axis=1)
        return bits[:, col - 8 * first : col - 8 * first + width].astype(bool)

    def remove(self) -> None:
        """Delete the file."""
        self.file.unlink()


def strip_rows(height: int, width: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of every strip."""
    rows = max(1, STRIP_PX // width)
    for row in range(0, height, rows):
        yield row, min(rows, height - row)


def without_small_objects(mask: BitMask, min_px: int) -> Iterator[NDArray[np.bool_]]:
    """Strips of the mask without connected objects (by sides, not corners) of fewer than `min_px` pixels."""
    is_kept, base = _object_sizes(mask) >= min_px, 0
    for row, rows in strip_rows(mask.height, mask.width):
        labels, num_labels = ndimage.label(mask.read(row, 0, rows, mask.width))
        yield np.concatenate([[False], is_kept[base : base + num_labels]])[labels]
        base += num_labels


def _object_sizes(mask: BitMask) -> NDArray[np.int64]:
    """For every object of every strip: pixels of the object of the whole image that it is part of."""
    sizes, joins, base = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)], 0
    above = np.zeros(mask.width, np.int64)
    for row, rows in strip_rows(mask.height, mask.width):
        labels, num_labels = ndimage.label(mask.read(row, 0, rows, mask.width))
        sizes.append(np.bincount(labels.ravel(), minlength=num_labels + 1)[1:])
        top = np.where(labels[0] > 0, labels[0].astype(np.int64) + base, 0)
        touching = (above > 0) & (top > 0)
        joins.append(np.unique(np.stack([above[touching], top[touching]], axis=1), axis=0))
        above = np.where(labels[-1] > 0, labels[-1].astype(np.int64) + base, 0)
        base += num_labels
    first, second = (np.concatenate(joins) - 1).T
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(base, base))
    if base == 0:
        return sizes[0]
    _, whole = connected_components(graph, directed=False)
    totals = np.bincount(whole, np.concatenate(sizes)).astype(np.int64)
    of_object: NDArray[np.int64] = totals[whole]
    return of_object


def eroded(mask: BitMask, erode_px: int) -> Iterator[NDArray[np.bool_]]:
    """Strips of the mask whose border moved inwards `erode_px` times by one pixel (by sides).

    The edge of the image is no border: what lies beyond it is not known.
    """
    for row, rows in strip_rows(mask.height, mask.width):
        start, stop = max(0, row - erode_px), min(mask.height, row + rows + erode_px)
        window = mask.read(start, 0, stop - start, mask.width)
        yield ndimage.binary_erosion(window, iterations=erode_px, border_value=1)[row - start : row - start + rows]
