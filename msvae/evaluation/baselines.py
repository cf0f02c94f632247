"""Baselines of an evaluation: PCA of blocks, and image codecs in as many bytes as the latents need."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msvae.distributed.collectives import Ranks
from msvae.evaluation.evaluator import Evaluator
from msvae.metrics.codecs import Codec, CodedTile, code_tile
from msvae.metrics.pca import MAX_BLOCKS, BlockScatter, fill_background, fit_blocks, project_blocks
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.shards.loader import Batch, Loader
from msvae.shards.manifest import MANIFEST_NAME, Manifest
from msvae.shards.order import in_micro_batches, stored_order
from msvae.shards.reader import ShardReader
from msvae.shards.stores import open_store
from msvae.shards.stores.store import MissingError

LATENT_BITS = 16
"""Bits of a latent value that is stored as float16."""
MAX_FITTED_TILES = 512
BATCH_SIZE = 8


@dataclass(frozen=True)
class Rate:
    """Size of a tile, background included, as latents and as shards store it without compression."""

    values_per_block: int
    """Latent channels: the number of values that represent a block of pixels."""
    block_px: int
    """Side of the block of pixels of a latent cell."""
    stored_bits_per_tile: int
    latent_bits_per_tile: int
    """Size of the latents as float16."""
    bits_per_value: float
    """Bits of the float16 latents per band of a pixel."""
    ratio_float16: float
    """Stored size divided by the size of the latents as float16."""
    ratio_float32: float
    """Stored size divided by the size of the latents as float32."""

    @classmethod
    def from_model(cls, model: AutoencoderKLMultispectralAdapter, manifest: Manifest) -> Rate:
        """Compute the sizes of the tiles of a split for a model."""
        channels, side = model.config.latent_channels, manifest.tile_px // model.downscale
        num_values = len(manifest.bands) * manifest.tile_px**2
        latent_bits = LATENT_BITS * channels * side**2
        stored = 8 * np.dtype(manifest.dtype).itemsize * num_values
        return cls(
            channels, model.downscale, stored, latent_bits,
            latent_bits / num_values, stored / latent_bits, stored / (2 * latent_bits),
        )  # fmt: skip


def values_per_block(manifest: Manifest, rate: Rate) -> int:
    """Return the number of values of a block of pixels: pixels times bands."""
    return len(manifest.bands) * rate.block_px**2


def find_training_split(split: str) -> str | None:
    """Return the `train` split in the same dataset, which can be `split` itself, or None if there is none."""
    dataset = split.rstrip("/").rpartition("/")[0] if "://" in split else Path(split).absolute().parent
    train = f"{dataset}/train"
    try:
        open_store(train).size_bytes(MANIFEST_NAME)
    except MissingError:
        return None
    return train


class BlockPca:
    """Reconstructs blocks of pixels from as many principal components as a latent cell has values.

    The components are fitted on up to 512 tiles, evenly spread over the training split of the same dataset. Without
    such a split they are fitted on the evaluated tiles. All ranks create it.
    """

    def __init__(self, evaluator: Evaluator, rate: Rate) -> None:
        evaluated, ranks = evaluator.reader, evaluator.ranks
        train = find_training_split(evaluated.store.location)
        reader = evaluated if train is None else ShardReader(train)
        if (reader.manifest.bands, reader.tile_shape) != (evaluated.manifest.bands, evaluated.tile_shape):
            train, reader = None, evaluated
        self._fitted_on, self._fitted_on_evaluated = reader.store.location, train is None
        self._side_px = rate.block_px
        self._mean_C = torch.tensor(evaluated.manifest.statistics.mean, dtype=torch.float64)
        scatter = BlockScatter(values_per_block(evaluated.manifest, rate), self._side_px, self._mean_C, ranks.device)
        for batch in _spread_tiles(reader, rate, ranks):
            scatter.add(batch.tiles, batch.leaf_mask)
        fitted = fit_blocks(ranks.all_reduce_sums(scatter.sums), rate.values_per_block)
        self._mean_D, self._components_DK = (part.to(ranks.device).contiguous() for part in fitted)
        # eigenvectors that are computed on another machine can differ in the last bits
        for part in (self._mean_D, self._components_DK):
            ranks.broadcast(part)

    def description(self) -> dict[str, Any]:
        """Return on which split the components were fitted, for `metrics.json`."""
        return {"fitted_on": self._fitted_on, "fitted_on_judged": self._fitted_on_evaluated}

    def __call__(self, batch: Batch) -> Tensor:
        """Reconstruct a batch, (B, C, H, W)."""
        return project_blocks(
            batch.tiles, batch.leaf_mask, self._mean_C, self._mean_D, self._components_DK, self._side_px
        )


class CodecAtRate:
    """Codes tiles in at most the bytes of their float16 latents and decodes them, in threads.

    A tile that does not fit at the coarsest quality becomes the mean leaf spectrum, which needs no bytes.
    """

    def __init__(self, codec: Codec, evaluator: Evaluator, rate: Rate) -> None:
        self._codec, self._max_bytes, self._ranks = codec, rate.latent_bits_per_tile // 8, evaluator.ranks
        self._mean_C = torch.tensor(evaluator.reader.manifest.statistics.mean, dtype=torch.float64)
        self._num_values = int(np.prod(evaluator.reader.tile_shape))
        example = {name: torch.zeros(1, dtype=torch.float64) for name in ("bytes", "fits")}
        self._columns = evaluator.new_columns(example)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._num_threads = max(1, len(os.sched_getaffinity(0)) // ranks_here)

    def __call__(self, batch: Batch) -> Tensor:
        """Reconstruct a batch, (B, C, H, W)."""
        filled = fill_background(batch.tiles, batch.leaf_mask, self._mean_C).cpu()
        with ThreadPoolExecutor(self._num_threads, "msvae-codec") as threads:
            coded = list(threads.map(lambda tile: code_tile(tile, self._max_bytes, self._codec), filled.numpy()))
        self._columns.put(
            batch,
            {
                "bytes": torch.tensor([0.0 if tile is None else float(tile.num_bytes) for tile in coded]),
                "fits": torch.tensor([float(tile is not None) for tile in coded]),
            },
        )
        return torch.stack(self._decoded(coded, filled)).to(batch.tiles.device)

    def size(self) -> dict[str, Any]:
        """Return the mean bits per value and the number of tiles that did not fit, for `metrics.json`. Collective."""
        columns = self._columns.all_reduce(self._ranks)
        return {
            "bits_per_value": float(columns["bytes"].mean() * 8 / self._num_values),
            "tiles_that_do_not_fit": int((columns["fits"] == 0).sum()),
        }

    def _decoded(self, coded: Sequence[CodedTile | None], filled_BCHW: Tensor) -> list[Tensor]:
        mean_CHW = self._mean_C[:, None, None].expand_as(filled_BCHW[0])
        return [mean_CHW if tile is None else torch.from_numpy(tile.reflectance) for tile in coded]


def _spread_tiles(reader: ShardReader, rate: Rate, ranks: Ranks) -> Loader:
    """Return a loader of this rank's share of tiles that are evenly spread over a split, few enough for exact sums."""
    samples = stored_order(reader.samples_per_shard)
    blocks_per_tile = (reader.manifest.tile_px // rate.block_px) ** 2
    num_tiles = max(1, min(len(samples), MAX_FITTED_TILES, MAX_BLOCKS // blocks_per_tile))
    slots: list[int] = np.unique(np.linspace(0, len(samples) - 1, num_tiles).astype(int)).tolist()
    plans = in_micro_batches((samples[slot] for slot in slots[ranks.rank :: ranks.world_size]), BATCH_SIZE)
    return Loader(reader, plans, batch_size=BATCH_SIZE, num_workers=1, device=ranks.device)
