"""Everything that is measured of one reconstruction of a split, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.distributed.collectives import Ranks
from msvae.evaluation.evaluator import Evaluator, Reconstruct
from msvae.evaluation.units import Units
from msvae.metrics.accumulate import TileSums, by_class, check_leaf
from msvae.metrics.aggregate import spectrum_sums
from msvae.metrics.brightness import NUM_BINS, DecileOf, brightness_counts
from msvae.metrics.detail import detail_sums
from msvae.metrics.histograms import ERROR_EDGES, NUM_ANGLE_BINS, angle_counts, error_counts
from msvae.metrics.tile_sums import LeafPixels
from msvae.shards.loader import Batch

SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class Judged:
    """Of one reconstruction: sums of every tile, and counts that were added over all tiles."""

    tiles: TileSums
    angle_counts: NDArray[np.float64]
    """(units, bins)."""
    error_counts: NDArray[np.float64]
    """(C, bins)."""
    units: Units

    def of_images(self) -> dict[str, NDArray[np.float64]]:
        """Sums of every image."""
        return _with_spectra(by_class(self.tiles, self.units.image_of_tile, len(self.units.images)))

    def of_groups(self) -> dict[str, NDArray[np.float64]]:
        """Sums of every group."""
        return _with_spectra(by_class(self.tiles, self.units.group_of_tile, len(self.units.groups)))

    def of_units(self) -> dict[str, NDArray[np.float64]]:
        """Sums of every unit that is drawn, its spectral angles by bin among them."""
        # before they share a place: an image's mean spectrum is its own
        sums = _with_spectra(by_class(self.tiles, self.units.drawn_of_tile, self.units.num_drawn))
        place = np.arange(self.units.num_drawn) % self.units.num_units
        return {**by_class(sums, place, self.units.num_units), "angle_counts": self.angle_counts}


class Judge:
    """Judges reconstructions of the split of `evaluator`. All ranks make it and call `judge`; `say` shows a line.

    Raises: ValueError when the split has no leaf pixel.
    """

    def __init__(self, evaluator: Evaluator, units: Units, ranks: Ranks, say: Callable[[str], None]) -> None:
        self.evaluator, self.units, self._ranks, self._say = evaluator, units, ranks, say
        self._decile_of = DecileOf(self._brightness())

    @property
    def brightness_edges(self) -> list[float]:
        """Between the deciles of brightness, in reflectance."""
        return self._decile_of.edges

    def judge(self, name: str, reconstruct: Reconstruct) -> Judged:
        """Measure a reconstruction.

        Raises: ValueError when it is not finite everywhere on a leaf.
        """
        device, units = self._ranks.device, self.units
        angles = torch.zeros(units.num_units, NUM_ANGLE_BINS, dtype=torch.int64, device=device)
        errors = torch.zeros(len(self.evaluator.bands), len(ERROR_EDGES) - 1, dtype=torch.int64, device=device)
        progress = _Progress(self._say, self.evaluator.reader.manifest.num_samples)

        def measure(batch: Batch, recon: Tensor) -> Mapping[str, Tensor]:
            pixels = LeafPixels.of(recon, batch.tiles, batch.leaf_mask)
            if not bool(pixels.recon.isfinite().all()):
                raise ValueError(
                    f"{name} reconstructs values that are not finite among {', '.join(batch.keys)}: it has diverged; "
                    "judge an earlier model of the run, such as best/"
                )
            for place, counts in zip(batch.plan.samples, angle_counts(pixels), strict=False):
                angles[int(units.unit_of_tile[place.slot])] += counts
            errors.add_(error_counts(pixels))
            progress.at(batch)
            return {
                **self.evaluator.basic_sums(pixels),
                **detail_sums(pixels, batch.leaf_mask, self.evaluator.bands, self._decile_of),
            }

        tiles = self.evaluator.tile_sums(reconstruct, measure)
        counts = self._ranks.all_reduce_sums({"angles": angles, "errors": errors})
        return Judged(tiles, counts["angles"].cpu().numpy(), counts["errors"].cpu().numpy(), units)

    @torch.no_grad()
    def _brightness(self) -> NDArray[np.int64]:
        counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=self._ranks.device)
        for batch in self.evaluator.batches():
            pixels = LeafPixels.of(batch.tiles, batch.tiles, batch.leaf_mask)
            counts += brightness_counts(pixels.brightness, pixels.leaf)
        joined = self._ranks.all_reduce_sums({"brightness": counts})["brightness"].cpu().numpy()
        check_leaf(joined)
        return joined.astype(np.int64)


def _with_spectra(sums: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    return {**sums, **spectrum_sums(sums)}


class _Progress:
    """A line every ten seconds."""

    def __init__(self, say: Callable[[str], None], num_tiles: int) -> None:
        self._say, self._num_tiles, self._said_at = say, num_tiles, time.monotonic()

    def at(self, batch: Batch) -> None:
        now = time.monotonic()
        if batch.plan.samples and now - self._said_at >= SAY_EVERY_S:
            self._say(f"  {batch.plan.samples[-1].slot + 1:,} of {self._num_tiles:,} tiles")
            self._said_at = now
