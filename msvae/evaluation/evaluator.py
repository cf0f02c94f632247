"""Evaluation over ranks: each sample once, the same batches and the same sums at every world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msvae.distributed.collectives import Ranks
from msvae.losses.terms import MaskedSum
from msvae.metrics.accumulate import TileSums
from msvae.metrics.spectral import spectral_sums
from msvae.metrics.structure import ssim_sums
from msvae.metrics.tile_sums import LeafPixels
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.report.composites import Example
from msvae.shards.loader import Batch, Loader
from msvae.shards.order import MicroBatchPlan, evaluation_plans, in_micro_batches, stored_order
from msvae.shards.reader import ShardReader

WEIGHTS = "band weights"
"""Name under which a tally keeps those of attention, beside the terms."""

Reconstruct = Callable[[Batch], Tensor]
"""From a batch to its reconstruction (B, C, H, W), reflectance."""


def by_model(model: AutoencoderKLMultispectralAdapter) -> Reconstruct:
    """Through the model's encoder and decoder, latents at the mode of their posterior."""

    def reconstruct(batch: Batch) -> Tensor:
        recon: Tensor = model(sample=batch.tiles, mask=batch.leaf_mask)[0]
        return recon

    return reconstruct


class LossTally:
    """Reconstructs like `by_model` and keeps the sums behind the terms that judge it, and the weights of the bands.

    They are kept batch by batch, so that they add up in one order at any number of ranks. KL is left out: it has no
    meaning for the posterior's mode.
    """

    def __init__(self, model: AutoencoderKLMultispectralAdapter, tile_shape: Sequence[int], num_batches: int) -> None:
        self._model = model
        tile = torch.zeros((1, *tile_shape), device=model.device)
        # a rank without a single batch must still join columns of the same shapes
        example = self._measured(tile, model.compute_losses(tile, tile), torch.ones_like(tile, dtype=torch.bool))
        self._columns = {
            name: torch.zeros((num_batches, *value.shape), dtype=torch.float64, device=model.device)
            for name, value in example.items()
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Reconstruction of a batch, (B, C, H, W)."""
        recon, losses = self._model(sample=batch.tiles, mask=batch.leaf_mask)
        for name, value in self._measured(batch.tiles, losses, batch.leaf_mask).items():
            self._columns[name][batch.plan.batch_index] = value
        tiles: Tensor = recon
        return tiles

    def join(self, ranks: Ranks) -> tuple[dict[str, float], list[float] | None]:
        """Mean of each term over all ranks' batches, and mean attention weight of each band over tiles with leaf."""
        joined = {name: column.sum(dim=0) for name, column in ranks.all_reduce_sums(self._columns).items()}
        names = [name.removeprefix("total/") for name in joined if name.startswith("total/")]
        sums = {name: MaskedSum(joined[f"total/{name}"], joined[f"count/{name}"]) for name in names}
        weights = sums.pop(WEIGHTS).mean().tolist() if WEIGHTS in sums else None
        return {term: float(masked_sum.overall()) for term, masked_sum in sums.items()}, weights

    def _measured(self, tiles: Tensor, losses: Mapping[str, Any], leaf_mask: Tensor) -> dict[str, Tensor]:
        sums = {term: masked_sum for term, masked_sum in losses["sums"].items() if term != "kl"}
        if self._model.input_attention is not None:
            sums[WEIGHTS] = self._model.band_weights(tiles, leaf_mask)
        totals = {f"total/{name}": masked_sum.total for name, masked_sum in sums.items()}
        return totals | {f"count/{name}": masked_sum.count for name, masked_sum in sums.items()}


class TileColumns:
    """Sums of every tile of a split, (T,) or (T, K) by name: each tile is put in by the one rank that reads it."""

    def __init__(self, num_tiles: int, example: Mapping[str, Tensor], device: torch.device) -> None:
        self.values = {
            name: torch.zeros((num_tiles, *sums.shape[1:]), dtype=torch.float64, device=device)
            for name, sums in example.items()
        }

    def put(self, batch: Batch, sums: Mapping[str, Tensor]) -> None:
        """Those of the tiles of a batch, (B,) or (B, K)."""
        slots = batch.slots
        for name, values in sums.items():
            self.values[name][slots] = values.to(self.values[name])


Measure = Callable[[Batch, Tensor], Mapping[str, Tensor]]
"""From a batch and its reconstruction to sums of each tile, (B,) or (B, K) by name."""


class Evaluator:
    """Judges reconstructions of one split. `batch_size` decides the batches, whatever the number of ranks."""

    def __init__(self, reader: ShardReader, ranks: Ranks, batch_size: int, num_workers: int) -> None:
        self.reader, self._ranks = reader, ranks
        self._batch_size, self._num_workers = batch_size, num_workers
        self.bands = reader.manifest.bands
        statistics = reader.manifest.statistics
        span = np.maximum(np.subtract(statistics.maximum, statistics.minimum), 1e-6)
        self._span: list[float] = span.tolist()

    @torch.no_grad()
    def tile_sums(self, reconstruct: Reconstruct, measure: Measure | None = None) -> TileSums:
        """Sums of every tile in stored order, the same on every rank; by default those of `basic_sums`."""
        measure = measure or (lambda batch, recon: self.basic_sums(LeafPixels.of(recon, batch.tiles, batch.leaf_mask)))
        columns = self.columns(measure(*self.nothing()))
        for batch in self.batches():
            columns.put(batch, measure(batch, reconstruct(batch)))
        # each tile was judged by one rank and is 0 on the others: adding them changes no bit
        return {name: column.cpu().numpy() for name, column in self._ranks.all_reduce_sums(columns.values).items()}

    def basic_sums(self, pixels: LeafPixels) -> dict[str, Tensor]:
        """What every evaluation measures."""
        return {**spectral_sums(pixels, self.bands), **ssim_sums(pixels, self._span)}

    def batches(self) -> Loader:
        """This rank's share of the split."""
        plans = evaluation_plans(
            self.reader.samples_per_shard,
            batch_size=self._batch_size,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
        )
        return self._load(plans)

    def nothing(self) -> tuple[Batch, Tensor]:
        """A tile without leaf and its reconstruction: they show the shapes of sums to ranks that have no tiles."""
        tile = torch.zeros((1, *self.reader.tile_shape), device=self._ranks.device)
        empty = Batch(tile, torch.zeros_like(tile[:, :1], dtype=torch.bool), ("",), MicroBatchPlan(0, ()))
        return empty, tile

    def columns(self, example: Mapping[str, Tensor]) -> TileColumns:
        """Room for sums of every tile, of the shapes of an example."""
        return TileColumns(self.reader.manifest.num_samples, example, self._ranks.device)

    @torch.no_grad()
    def examples(self, reconstruct: Reconstruct, slots: Sequence[int]) -> list[Example]:
        """Chosen tiles of the split and their reconstructions, made one by one on the calling rank alone."""
        samples = stored_order(self.reader.samples_per_shard)
        plans = in_micro_batches((samples[slot] for slot in slots), batch_size=1)
        return [
            Example.of_tensors(batch.keys[0], batch.tiles[0], reconstruct(batch)[0], batch.leaf_mask[0, 0])
            for batch in self._load(plans)
        ]

    def tally(self, model: AutoencoderKLMultispectralAdapter) -> LossTally:
        """A reconstruction for `tile_sums` that also keeps the terms of the loss."""
        num_batches = -(-self.reader.manifest.num_samples // self._batch_size)
        return LossTally(model, self.reader.tile_shape, num_batches)

    def _load(self, plans: Iterator[MicroBatchPlan]) -> Loader:
        return Loader(
            self.reader,
            plans,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            device=self._ranks.device,
        )
