"""Windows that overlap and cover a raster, and the weights with which what is made of them blends without seams."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class WindowsAlong:
    """Windows of one size along one side of a raster of `length_px`; all but one lie inside it, up to a cell."""

    length_px: int
    tile_px: int
    overlap_px: int
    """Least overlap of neighbours. A quarter at either end is context that is thrown away: near its border a window
    does not see what lies beyond."""
    cell_px: int = 8
    """Side of a latent cell. Windows begin and end on multiples, so that all cut a raster into the same cells."""

    @property
    def window_px(self) -> int:
        """Side of a window: `tile_px`, or less where the raster is smaller."""
        return min(self.tile_px, self._covered_px)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First pixel of every window, in even steps."""
        beyond = self._covered_px - self.window_px
        steps = math.ceil(beyond / (self.tile_px - self.overlap_px))
        return (*(round(i * beyond / steps / self.cell_px) * self.cell_px for i in range(steps)), beyond)

    @property
    def _covered_px(self) -> int:
        return -(-self.length_px // self.cell_px) * self.cell_px

    def weights(self, window: int) -> NDArray[np.float32]:
        """Share of a window in what is shown at each of its pixels, (window_px,); those of all windows add up to 1."""
        start = self.starts[window]
        total = sum(
            self._ramps(other, start)
            for other in range(len(self.starts))
            if abs(self.starts[other] - start) < self.window_px
        )
        weights: NDArray[np.float32] = (self._ramps(window, start) / total).astype(np.float32)
        return weights

    def touching(self, begin: int, end: int) -> Iterator[int]:
        """Windows that are seen between two pixels."""
        for window, start in enumerate(self.starts):
            seen = np.flatnonzero(self._ramps(window, start)) + start
            if seen[0] < end and begin <= seen[-1]:
                yield window

    def complete_before(self, window: int) -> int:
        """The first pixel that a later window than this one changes, or the end."""
        if window + 1 == len(self.starts):
            return self.length_px
        return self.starts[window + 1]

    def _ramps(self, window: int, origin: int) -> NDArray[np.float64]:
        """A window's weight before it is shared, at the `window_px` pixels from `origin` on: 1 inside, and a raised
        cosine over each overlap, but for the context."""
        pixel: NDArray[np.float64] = np.arange(self.window_px, dtype=np.float64) + 0.5 + origin
        start, end = self.starts[window], self.starts[window] + self.window_px
        inside: NDArray[np.float64] = ((start < pixel) & (pixel < end)).astype(np.float64)
        if window > 0:
            inside *= _rise(pixel, start, self.starts[window - 1] + self.window_px, self.overlap_px)
        if window + 1 < len(self.starts):
            inside *= 1 - _rise(pixel, self.starts[window + 1], end, self.overlap_px)
        return inside


def _rise(pixel: NDArray[np.float64], begin: int, end: int, overlap_px: int) -> NDArray[np.float64]:
    """From 0 to 1 over the overlap from `begin` to `end`, context left out at both ends."""
    context_px = overlap_px / 4
    share = np.clip((pixel - begin - context_px) / (end - begin - 2 * context_px), 0, 1)
    rise: NDArray[np.float64] = (1 - np.cos(np.pi * share)) / 2
    return rise
