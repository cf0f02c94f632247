"""What stands beside the model in the table: other ways to keep leaves in few numbers, and none at all."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msvae.distributed.collectives import Ranks
from msvae.evaluation.evaluator import Evaluator
from msvae.evaluation.latents import Rate
from msvae.metrics.codecs import Codec, Coded, at_rate
from msvae.metrics.pca import MAX_BLOCKS, BlockScatter, components, fill, through_components
from msvae.shards.loader import Batch, Loader
from msvae.shards.manifest import MANIFEST_NAME
from msvae.shards.order import in_micro_batches, stored_order
from msvae.shards.reader import ShardReader
from msvae.shards.stores import open_store
from msvae.shards.stores.store import MissingError

MAX_FITTED_TILES = 512
BATCH_SIZE = 8


def training_split(split: str) -> str | None:
    """`train` beside a split, or the split itself where it is that; None when there is none."""
    above = split.rstrip("/").rpartition("/")[0] if "://" in split else Path(split).absolute().parent
    beside = f"{above}/train"
    try:
        open_store(beside).size_bytes(MANIFEST_NAME)
    except MissingError:
        return None
    return beside


class BlockPca:
    """Blocks of pixels through as many principal components as a latent cell has values.

    Fitted on up to 512 tiles, evenly spread over the training split beside the judged one, or over the judged one.
    """

    def __init__(self, evaluator: Evaluator, rate: Rate, ranks: Ranks) -> None:
        judged = evaluator.reader
        train = training_split(judged.store.location)
        reader = judged if train is None else ShardReader(train)
        if (reader.manifest.bands, reader.tile_shape) != (judged.manifest.bands, judged.tile_shape):
            train, reader = None, judged
        self._fitted_on, self._fitted_on_judged = reader.store.location, train is None
        self._side_px = rate.block_px
        self._mean_C = torch.tensor(judged.manifest.statistics.mean, dtype=torch.float64)
        scatter = BlockScatter(numbers_per_block(judged, rate), self._side_px, self._mean_C, ranks.device)
        for batch in _spread_tiles(reader, rate, ranks):
            scatter.add(batch.tiles, batch.leaf_mask)
        fitted = components(ranks.all_reduce_sums(scatter.sums), rate.values_per_block)
        self._mean_D, self._components_DK = (part.to(ranks.device).contiguous() for part in fitted)
        # another machine's eigenvectors differ in the last bits
        for part in (self._mean_D, self._components_DK):
            ranks.broadcast(part)

    def about(self) -> dict[str, Any]:
        """What it was fitted on."""
        return {"fitted_on": self._fitted_on, "fitted_on_judged": self._fitted_on_judged}

    def __call__(self, batch: Batch) -> Tensor:
        """Reconstruction of a batch, (B, C, H, W)."""
        return through_components(
            batch.tiles, batch.leaf_mask, self._mean_C, self._mean_D, self._components_DK, self._side_px
        )


def numbers_per_block(reader: ShardReader, rate: Rate) -> int:
    """Pixels times bands of a block."""
    return len(reader.manifest.bands) * rate.block_px**2


class AtRate:
    """Tiles through a codec in no more bytes than their latents take as float16, coded in threads.

    A tile that does not fit at the coarsest quality becomes the mean leaf spectrum, which takes nothing.
    """

    def __init__(self, codec: Codec, evaluator: Evaluator, rate: Rate, ranks: Ranks) -> None:
        self._codec, self._max_bytes = codec, rate.latent_bits_per_tile // 8
        self._mean_C = torch.tensor(evaluator.reader.manifest.statistics.mean, dtype=torch.float64)
        self._num_values = int(np.prod(evaluator.reader.tile_shape))
        example = {name: torch.zeros(1, dtype=torch.float64) for name in ("bytes", "fits")}
        self._columns = evaluator.columns(example)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._num_threads = max(1, len(os.sched_getaffinity(0)) // ranks_here)

    def __call__(self, batch: Batch) -> Tensor:
        """Reconstruction of a batch, (B, C, H, W)."""
        filled = fill(batch.tiles, batch.leaf_mask, self._mean_C).cpu()
        with ThreadPoolExecutor(self._num_threads, "msvae-codec") as threads:
            coded = list(threads.map(lambda tile: at_rate(tile, self._max_bytes, self._codec), filled.numpy()))
        self._columns.put(
            batch,
            {
                "bytes": torch.tensor([0.0 if tile is None else float(tile.num_bytes) for tile in coded]),
                "fits": torch.tensor([float(tile is not None) for tile in coded]),
            },
        )
        decoded = [self._reflectance(tile, like) for tile, like in zip(coded, filled, strict=True)]
        return torch.stack(decoded).to(batch.tiles.device)

    def numbers(self, ranks: Ranks) -> dict[str, Any]:
        """Over all ranks: mean bits a value, and how many tiles did not fit."""
        columns = ranks.all_reduce_sums(self._columns.values)
        num_bytes, fits = columns["bytes"].cpu().numpy(), columns["fits"].cpu().numpy()
        return {
            "bits_per_value": float(num_bytes.mean() * 8 / self._num_values),
            "tiles_that_do_not_fit": int((fits == 0).sum()),
        }

    def _reflectance(self, coded: Coded | None, filled_CHW: Tensor) -> Tensor:
        if coded is None:
            return self._mean_C[:, None, None].expand_as(filled_CHW)
        return torch.from_numpy(coded.reflectance)


def _spread_tiles(reader: ShardReader, rate: Rate, ranks: Ranks) -> Loader:
    """This rank's share of tiles evenly spread over a split, few enough for exact sums."""
    samples = stored_order(reader.samples_per_shard)
    blocks_per_tile = (reader.manifest.tile_px // rate.block_px) ** 2
    num_tiles = max(1, min(len(samples), MAX_FITTED_TILES, MAX_BLOCKS // blocks_per_tile))
    slots: list[int] = np.unique(np.linspace(0, len(samples) - 1, num_tiles).astype(int)).tolist()
    plans = in_micro_batches((samples[slot] for slot in slots[ranks.rank :: ranks.world_size]), BATCH_SIZE)
    return Loader(reader, plans, batch_size=BATCH_SIZE, num_workers=1, device=ranks.device)
