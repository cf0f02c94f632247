"""All measurements of one reconstruction of a split: sums of every tile, counts of errors, statistics of latents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.evaluation.evaluator import Evaluator, Reconstruct
from msvae.losses.coverage import latent_coverage
from msvae.metrics.aggregate import Sums, check_leaf, latent_statistics, mean_spectrum_sums, sum_by_class
from msvae.metrics.detail import detail_sums
from msvae.metrics.histograms import (
    ERROR_EDGES,
    NUM_ANGLE_BINS,
    NUM_BRIGHTNESS_BINS,
    BrightnessDeciles,
    angle_counts,
    brightness_counts,
    error_counts,
)
from msvae.metrics.tile_sums import LeafPixels, latent_sums
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.shards.loader import Batch
from msvae.shards.splits import TileOrigin

MAX_ROWS = 1000
"""Largest number of rows of sums for resampling. If there are more units, several share a row. That limits the memory,
and hardly changes the intervals."""
PROGRESS_EVERY_S = 10.0


@dataclass(frozen=True)
class Units:
    """Number of the image, of the group and of the resampling unit of every tile, in stored order.

    The units of bootstrap resampling are images. For a split of one image they are its blocks, else its tiles.
    """

    images: list[str]
    image_of_tile: NDArray[np.int64]
    groups: list[str]
    group_of_tile: NDArray[np.int64]
    kind: str
    """Kind of a resampling unit: `image`, `block` or `tile`."""
    unit_of_tile: NDArray[np.int64]
    num_units: int

    @classmethod
    def from_origins(cls, origins: Sequence[TileOrigin]) -> Units:
        """Choose the resampling units of a split. Tiles of one image are similar, so they are resampled together."""
        images, image_of_tile = _number_names([origin.image for origin in origins])
        groups, group_of_tile = _number_names([origin.group for origin in origins])
        kind, unit_of_tile = "image", image_of_tile
        if len(images) == 1:
            # blocks are further apart than tiles, hence less dependent
            kind, unit_of_tile = ("block", group_of_tile) if len(groups) > 1 else ("tile", np.arange(len(origins)))
        return cls(images, image_of_tile, groups, group_of_tile, kind, unit_of_tile, int(unit_of_tile.max()) + 1)

    @property
    def num_rows(self) -> int:
        """Number of rows of sums that are resampled."""
        return min(self.num_units, MAX_ROWS)

    @cached_property
    def row_of_tile(self) -> NDArray[np.int64]:
        """Row of sums of each tile."""
        return self.unit_of_tile % self.num_rows


@dataclass(frozen=True)
class Measurement:
    """Sums and counts of one reconstruction of a split."""

    tiles: Sums
    """Sums of every tile."""
    angle_counts: NDArray[np.float64]
    """Spectral angles by bin, (resampling rows, bins)."""
    error_counts: NDArray[np.float64]
    """Errors by band and bin, (C, bins)."""
    units: Units

    def image_sums(self) -> dict[str, NDArray[np.float64]]:
        """Return the sums of every image."""
        return self._class_sums(self.units.image_of_tile, len(self.units.images))

    def group_sums(self) -> dict[str, NDArray[np.float64]]:
        """Return the sums of every group."""
        return self._class_sums(self.units.group_of_tile, len(self.units.groups))

    def resampling_sums(self) -> dict[str, NDArray[np.float64]]:
        """Return the rows of sums that are resampled, with their spectral angles by bin."""
        # the mean spectrum is computed per unit, so this comes before units share rows
        sums = self._class_sums(self.units.unit_of_tile, self.units.num_units)
        row_of_unit = np.arange(self.units.num_units) % self.units.num_rows
        return {**sum_by_class(sums, row_of_unit, self.units.num_rows), "angle_counts": self.angle_counts}

    def _class_sums(self, class_of_tile: NDArray[np.int64], num_classes: int) -> dict[str, NDArray[np.float64]]:
        sums = sum_by_class(self.tiles, class_of_tile, num_classes)
        return {**sums, **mean_spectrum_sums(sums)}


class Measurer:
    """Measures reconstructions of the split of `evaluator`. All ranks create it and call `measure`.

    Args: `say` prints a line of progress.
    Raises: ValueError if the split has no leaf pixel.
    """

    def __init__(self, evaluator: Evaluator, units: Units, say: Callable[[str], None]) -> None:
        self.evaluator, self.units, self._say = evaluator, units, say
        self._deciles = BrightnessDeciles(self._count_brightness())

    @property
    def brightness_edges(self) -> list[float]:
        """Brightness values between the deciles, in reflectance."""
        return self._deciles.edges

    def measure(self, name: str, reconstruct: Reconstruct) -> Measurement:
        """Measure a reconstruction. Collective.

        Raises: ValueError if it is not finite at a leaf pixel.
        """
        evaluator, units = self.evaluator, self.units
        device = evaluator.ranks.device
        angles = torch.zeros(units.num_rows, NUM_ANGLE_BINS, dtype=torch.int64, device=device)
        errors = torch.zeros(len(evaluator.bands), len(ERROR_EDGES) - 1, dtype=torch.int64, device=device)
        progress = _Progress(self._say, evaluator.reader.manifest.num_samples)

        def measure_batch(batch: Batch, recon: Tensor) -> Mapping[str, Tensor]:
            pixels = LeafPixels.from_tensors(recon, batch.tiles, batch.leaf_mask)
            if not bool(pixels.recon.isfinite().all()):
                raise ValueError(
                    f"{name} reconstructs values that are not finite in some of the tiles {', '.join(batch.keys)}: it "
                    "diverged; evaluate an earlier model of the run, such as best/"
                )
            for slot, counts in zip(batch.slots, angle_counts(pixels), strict=False):
                angles[int(units.row_of_tile[slot])] += counts
            errors.add_(error_counts(pixels))
            progress.show(batch)
            return {
                **evaluator.basic_sums(pixels),
                **detail_sums(pixels, batch.leaf_mask, evaluator.bands, self._deciles),
            }

        tiles = evaluator.tile_sums(reconstruct, measure_batch)
        counts = evaluator.ranks.all_reduce_sums({"angles": angles, "errors": errors})
        return Measurement(tiles, counts["angles"].cpu().numpy(), counts["errors"].cpu().numpy(), units)

    @torch.no_grad()
    def _count_brightness(self) -> NDArray[np.int64]:
        ranks = self.evaluator.ranks
        counts = torch.zeros(NUM_BRIGHTNESS_BINS, dtype=torch.int64, device=ranks.device)
        for batch in self.evaluator.batches():
            pixels = LeafPixels.from_tensors(batch.tiles, batch.tiles, batch.leaf_mask)
            counts += brightness_counts(pixels.brightness, pixels.leaf)
        joined = ranks.all_reduce_sums({"brightness": counts})["brightness"].cpu().numpy()
        check_leaf(joined)
        return joined.astype(np.int64)


class ReconstructAndSumLatents:
    """Reconstructs with a model, as `reconstruct_with` does, and keeps sums over the latents."""

    def __init__(self, model: AutoencoderKLMultispectralAdapter, evaluator: Evaluator) -> None:
        self._model, self._ranks = model, evaluator.ranks
        batch, _ = evaluator.empty_batch()
        with torch.no_grad():
            self._columns = evaluator.new_columns(self._sums(batch, self._encode(batch)))

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Reconstruct a batch, (B, C, H, W)."""
        posterior = self._encode(batch)
        self._columns.put(batch, self._sums(batch, posterior))
        (recon,) = self._model.decode(posterior.mode(), return_dict=False)
        return recon

    def statistics(self) -> dict[str, Any]:
        """Return the `latent_statistics` of all tiles. Collective."""
        return latent_statistics(self._columns.all_reduce(self._ranks))

    def _encode(self, batch: Batch) -> Any:
        return self._model.encode(batch.tiles, mask=batch.leaf_mask).latent_dist

    def _sums(self, batch: Batch, posterior: Any) -> dict[str, Tensor]:
        share = latent_coverage(batch.leaf_mask, self._model.downscale)
        return latent_sums(posterior.mean, posterior.logvar, share)


def _number_names(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct names in the order of their first appearance, and the number of each name."""
    number_of: dict[str, int] = {}
    numbers = [number_of.setdefault(name, len(number_of)) for name in names]
    return list(number_of), np.array(numbers, np.int64)


class _Progress:
    """A line of progress every ten seconds."""

    def __init__(self, say: Callable[[str], None], num_tiles: int) -> None:
        self._say, self._num_tiles, self._said_at = say, num_tiles, time.monotonic()

    def show(self, batch: Batch) -> None:
        now = time.monotonic()
        if batch.slots and now - self._said_at >= PROGRESS_EVERY_S:
            self._say(f"  {batch.slots[-1] + 1:,} of {self._num_tiles:,} tiles")
            self._said_at = now
