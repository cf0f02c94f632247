"""A model that reconstructs and keeps what its latents look like; what they take to store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msvae.distributed.collectives import Ranks
from msvae.evaluation.evaluator import Evaluator
from msvae.losses.coverage import latent_coverage
from msvae.metrics.latents import latent_numbers, latent_sums
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.shards.loader import Batch
from msvae.shards.manifest import Manifest

LATENT_BITS = 16
"""Of a latent value, stored as float16."""


class ThroughLatents:
    """Reconstructs at the mode of the posterior, as `by_model` does, and keeps sums over its latents."""

    def __init__(self, model: AutoencoderKLMultispectralAdapter, evaluator: Evaluator) -> None:
        self._model = model
        batch, _ = evaluator.nothing()
        with torch.no_grad():
            self._columns = evaluator.columns(self._sums(batch, self._posterior(batch)))

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Reconstruction of a batch, (B, C, H, W)."""
        posterior = self._posterior(batch)
        self._columns.put(batch, self._sums(batch, posterior))
        (recon,) = self._model.decode(posterior.mode(), return_dict=False)
        return recon

    def numbers(self, ranks: Ranks) -> dict[str, Any]:
        """Of `latent_numbers`, over all ranks."""
        return latent_numbers(
            {name: column.cpu().numpy() for name, column in ranks.all_reduce_sums(self._columns.values).items()}
        )

    def _posterior(self, batch: Batch) -> Any:
        return self._model.encode(batch.tiles, mask=batch.leaf_mask).latent_dist

    def _sums(self, batch: Batch, posterior: Any) -> dict[str, Tensor]:
        share = latent_coverage(batch.leaf_mask, self._model.downscale)
        return latent_sums(posterior.mean, posterior.logvar, share)


@dataclass(frozen=True)
class Rate:
    """What a tile takes, background included, stored as shards hold it without compression and as latents."""

    values_per_block: int
    """Latent channels: what stands for a block of pixels."""
    block_px: int
    stored_bits_per_tile: int
    latent_bits_per_tile: int
    """With latents as float16."""
    bits_per_value: float
    """Latent bits over pixels and bands."""
    ratio_float16: float
    """Stored bits over those of latents as float16."""
    ratio_float32: float

    @classmethod
    def of(cls, model: AutoencoderKLMultispectralAdapter, manifest: Manifest) -> Rate:
        """Of tiles of a split through a model."""
        channels, side = model.config.latent_channels, manifest.tile_px // model.downscale
        num_values = len(manifest.bands) * manifest.tile_px**2
        latent_bits = LATENT_BITS * channels * side**2
        stored = 8 * np.dtype(manifest.dtype).itemsize * num_values
        return cls(
            channels, model.downscale, stored, latent_bits,
            latent_bits / num_values, stored / latent_bits, stored / (2 * latent_bits),
        )  # fmt: skip

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
