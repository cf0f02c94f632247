"""Evaluation over ranks: every tile once, with the same batches and the same sums at every world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msvae.distributed.collectives import Ranks
from msvae.losses.terms import MaskedSum
from msvae.metrics.aggregate import Sums
from msvae.metrics.tile_sums import LeafPixels, spectral_sums, ssim_sums
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.report.composites import Example
from msvae.shards.loader import Batch, Loader
from msvae.shards.order import MicroBatchPlan, evaluation_plans, in_micro_batches, stored_order
from msvae.shards.reader import ShardReader

BAND_WEIGHTS = "band weights"
"""Name of the attention weights of the bands among the sums of loss terms."""

Reconstruct = Callable[[Batch], Tensor]
"""Function from a batch to its reconstruction (B, C, H, W) in reflectance."""
Measure = Callable[[Batch, Tensor], Mapping[str, Tensor]]
"""Function from a batch and its reconstruction to sums of each tile, (B,) or (B, K) by name."""


def reconstruct_with(model: AutoencoderKLMultispectralAdapter) -> Reconstruct:
    """Return a function that reconstructs a batch with the model, from the mode of the posterior."""

    def reconstruct(batch: Batch) -> Tensor:
        recon: Tensor = model(sample=batch.tiles, mask=batch.leaf_mask)[0]
        return recon

    return reconstruct


class LossSums:
    """A `Reconstruct` function that also keeps the sums of the loss terms and the attention weights of the bands.

    The sums are kept per batch and added in one order, so that the result does not depend on the number of ranks. KL
    is left out, because it has no meaning for the mode of the posterior.
    """

    def __init__(self, model: AutoencoderKLMultispectralAdapter, tile_shape: Sequence[int], num_batches: int) -> None:
        self._model = model
        tile = torch.zeros((1, *tile_shape), device=model.device)
        # a rank without any batch must reduce columns of the same shapes as the others
        example = self._batch_sums(tile, model.compute_losses(tile, tile), torch.ones_like(tile, dtype=torch.bool))
        self._columns = {
            name: torch.zeros((num_batches, *value.shape), dtype=torch.float64, device=model.device)
            for name, value in example.items()
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Reconstruct a batch, (B, C, H, W)."""
        recon, losses = self._model(sample=batch.tiles, mask=batch.leaf_mask)
        for name, value in self._batch_sums(batch.tiles, losses, batch.leaf_mask).items():
            self._columns[name][batch.plan.batch_index] = value
        tiles: Tensor = recon
        return tiles

    def means(self, ranks: Ranks) -> tuple[dict[str, float], list[float] | None]:
        """Return the mean of each loss term over all ranks, and the mean attention weight of each band. Collective.

        The attention weights are means over tiles with leaf, or None for a model without attention.
        """
        joined = {name: column.sum(dim=0) for name, column in ranks.all_reduce_sums(self._columns).items()}
        names = [name.removeprefix("total/") for name in joined if name.startswith("total/")]
        sums = {name: MaskedSum(joined[f"total/{name}"], joined[f"count/{name}"]) for name in names}
        weights = sums.pop(BAND_WEIGHTS).mean().tolist() if BAND_WEIGHTS in sums else None
        return {term: float(masked_sum.overall()) for term, masked_sum in sums.items()}, weights

    def _batch_sums(self, tiles: Tensor, losses: Mapping[str, Any], leaf_mask: Tensor) -> dict[str, Tensor]:
        sums = {term: masked_sum for term, masked_sum in losses["sums"].items() if term != "kl"}
        if self._model.input_attention is not None:
            sums[BAND_WEIGHTS] = self._model.band_weights(tiles, leaf_mask)
        totals = {f"total/{name}": masked_sum.total for name, masked_sum in sums.items()}
        return totals | {f"count/{name}": masked_sum.count for name, masked_sum in sums.items()}


class TileColumns:
    """Sums of every tile of a split, (T,) or (T, K) by name. Each tile is written by the one rank that reads it."""

    def __init__(self, num_tiles: int, example: Mapping[str, Tensor], device: torch.device) -> None:
        self.values = {
            name: torch.zeros((num_tiles, *sums.shape[1:]), dtype=torch.float64, device=device)
            for name, sums in example.items()
        }

    def put(self, batch: Batch, sums: Mapping[str, Tensor]) -> None:
        """Write the sums of the tiles of a batch, (B,) or (B, K)."""
        for name, values in sums.items():
            self.values[name][batch.slots] = values.to(self.values[name])

    def all_reduce(self, ranks: Ranks) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """Return the sums of all tiles on every rank. Collective."""
        # each tile was written by one rank and is 0 on the others: adding them changes no bit
        return {name: column.cpu().numpy() for name, column in ranks.all_reduce_sums(self.values).items()}


class Evaluator:
    """Evaluates reconstructions of one split. The batches depend on `batch_size` and not on the number of ranks."""

    def __init__(self, reader: ShardReader, ranks: Ranks, batch_size: int, num_workers: int) -> None:
        self.reader, self.ranks = reader, ranks
        self._batch_size, self._num_workers = batch_size, num_workers
        self.bands = reader.manifest.bands
        statistics = reader.manifest.statistics
        span = np.maximum(np.subtract(statistics.maximum, statistics.minimum), 1e-6)
        self._span: list[float] = span.tolist()

    @torch.no_grad()
    def tile_sums(self, reconstruct: Reconstruct, measure: Measure | None = None) -> Sums:
        """Reconstruct every tile and return its sums in stored order, the same on every rank. Collective.

        Args: `measure` returns the sums of a batch; the default is `basic_sums`.
        """
        measure = measure or (
            lambda batch, recon: self.basic_sums(LeafPixels.from_tensors(recon, batch.tiles, batch.leaf_mask))
        )
        columns = self.new_columns(measure(*self.empty_batch()))
        for batch in self.batches():
            columns.put(batch, measure(batch, reconstruct(batch)))
        return columns.all_reduce(self.ranks)

    def basic_sums(self, pixels: LeafPixels) -> dict[str, Tensor]:
        """Return the sums of each tile that every evaluation needs."""
        return {**spectral_sums(pixels, self.bands), **ssim_sums(pixels, self._span)}

    def batches(self) -> Loader:
        """Return a loader of this rank's share of the split."""
        plans = evaluation_plans(
            self.reader.samples_per_shard,
            batch_size=self._batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        return self._load(plans)

    def empty_batch(self) -> tuple[Batch, Tensor]:
        """Return a tile without leaf and its reconstruction. Ranks without tiles need them for the shapes of sums."""
        tile = torch.zeros((1, *self.reader.tile_shape), device=self.ranks.device)
        empty = Batch(tile, torch.zeros_like(tile[:, :1], dtype=torch.bool), ("",), MicroBatchPlan(0, ()))
        return empty, tile

    def new_columns(self, example: Mapping[str, Tensor]) -> TileColumns:
        """Return empty columns for all tiles of the split, with the shapes of the example."""
        return TileColumns(self.reader.manifest.num_samples, example, self.ranks.device)

    @torch.no_grad()
    def examples(self, reconstruct: Reconstruct, slots: Sequence[int]) -> list[Example]:
        """Reconstruct chosen tiles of the split one by one, on the calling rank alone."""
        samples = stored_order(self.reader.samples_per_shard)
        plans = in_micro_batches((samples[slot] for slot in slots), batch_size=1)
        return [
            Example.from_tensors(batch.keys[0], batch.tiles[0], reconstruct(batch)[0], batch.leaf_mask[0, 0])
            for batch in self._load(plans)
        ]

    def loss_sums(self, model: AutoencoderKLMultispectralAdapter) -> LossSums:
        """Return a `Reconstruct` function for `tile_sums` that also sums the loss terms."""
        num_batches = -(-self.reader.manifest.num_samples // self._batch_size)
        return LossSums(model, self.reader.tile_shape, num_batches)

    def _load(self, plans: Iterator[MicroBatchPlan]) -> Loader:
        return Loader(
            self.reader,
            plans,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            device=self.ranks.device,
        )
