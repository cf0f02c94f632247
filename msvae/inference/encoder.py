"""Encode batches of tiles into latents, and measure mean and standard deviation of latents on leaves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from msvae.inference.load import explain_out_of_memory, model_sha256
from msvae.losses.coverage import latent_coverage
from msvae.messages import counted
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.shards.latents import LatentStatistics
from msvae.shards.loader import Batch
from msvae.shards.order import hash_key
from msvae.shards.sample_codec import npy_header

Kind = Literal["moments", "sample"]
Precision = Literal["float32", "float16"]


@dataclass(frozen=True)
class EncodeOptions:
    """Form of the stored latents.

    Raises: ValueError if a value is not allowed.
    """

    kind: Kind = "moments"
    """`moments` for mean and log variance of the posterior, or `sample` for one sample from it."""
    dtype: Precision = "float32"
    seed: int = 0
    """Seed of the samples. A sample depends on the seed and on the key of its tile alone."""
    batch_size: int = 8
    """Number of tiles in a forward pass. A batch never contains tiles of two shards."""

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--kind", self.kind, get_args(Kind)),
            ("--dtype", self.dtype, get_args(Precision)),
        ):
            if value not in known:
                raise ValueError(f"got {option} {value}, expected {' or '.join(known)}")
        if self.batch_size < 1:
            raise ValueError(f"got --batch-size {self.batch_size}, expected 1 or more")


class EncodedTile(NamedTuple):
    """Latents of one tile, ready to be stored."""

    key: str
    npy: bytes
    """Latents as an `.npy` file."""
    leaf_mask: NDArray[np.bool_]
    """(H, W)."""
    sums: NDArray[np.float64]
    """`leaf_sums` of the tile."""


class Encoder:
    """A model and the form in which its latents are stored."""

    def __init__(self, model: AutoencoderKLMultispectralAdapter, options: EncodeOptions) -> None:
        self.model, self.options = model, options
        self.sha256 = model_sha256(model)

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Iterator[EncodedTile]:
        """Yield the latents of each tile of a batch, in order.

        Raises: ValueError if latents are not finite, or too large for their type.
        """
        with explain_out_of_memory(counted(len(batch.tiles), "tile"), batch.tiles, "--batch-size"):
            posterior = self.model.encode(batch.tiles, mask=batch.leaf_mask).latent_dist
        share_Bhw = latent_coverage(batch.leaf_mask, self.model.downscale)
        columns = (
            x.float().cpu().numpy() for x in (posterior.mean, posterior.logvar, share_Bhw, batch.leaf_mask[:, 0])
        )
        for key, mean, logvar, share, leaf in zip(batch.keys, *columns, strict=True):
            stored = self._stored(key, mean, logvar)
            if not np.isfinite(stored).all():
                raise ValueError(
                    f"sample {key} has latents that are not finite in {self.options.dtype}; "
                    "give --dtype float32, or use another checkpoint of the model"
                )
            sums = leaf_sums(*(part.astype(np.float64) for part in (mean, logvar, share)))
            yield EncodedTile(key, npy_header(stored.shape, stored.dtype) + stored.tobytes(), leaf > 0, sums)

    def _stored(self, key: str, mean: NDArray[np.float32], logvar: NDArray[np.float32]) -> NDArray[np.floating]:
        if self.options.kind == "moments":
            latents = np.concatenate([mean, logvar])
        else:
            number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
            generator = torch.Generator().manual_seed(hash_key(self.options.seed, number) >> 1)
            latents = mean + np.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).numpy()
        with np.errstate(over="ignore"):
            return latents.astype(np.dtype(self.options.dtype).newbyteorder("<"))


def leaf_sums(
    mean_Chw: NDArray[np.float64], logvar_Chw: NDArray[np.float64], share_hw: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return sums over the latent cells of one tile, weighted by the leaf share of each cell as in the KL term.

    The latents are samples from the posterior, so the expectation of their square is mean^2 + variance.

    Returns: (1 + 2C,): the sum of leaf shares, and per channel the sums of latents and of their squares. Sums of tiles
        and shards are combined by adding.
    """
    leaf = share_hw > 0
    share = share_hw[leaf]
    mean, variance = mean_Chw[:, leaf], np.exp(logvar_Chw[:, leaf])
    return np.concatenate([[share.sum()], (mean * share).sum(axis=1), ((mean**2 + variance) * share).sum(axis=1)])


def leaf_latent_statistics(sums: NDArray[np.float64]) -> LatentStatistics:
    """Return mean and standard deviation of each channel over leaf cells.

    Args:
        sums: sum of `leaf_sums` over all tiles of a split.
    Raises: ValueError if there is no leaf.
    """
    num_cells, (mean, square) = float(sums[0]), np.split(sums[1:], 2)
    if not num_cells:
        raise ValueError(
            "the split for shift_factor and scaling_factor has no leaf pixel; pack it with another --mask"
        )
    mean = mean / num_cells
    std = np.sqrt(np.maximum(square / num_cells - mean**2, 0))
    return LatentStatistics(num_cells=num_cells, mean=mean.tolist(), std=std.tolist())


def diffusion_factors(statistics: LatentStatistics) -> tuple[float, float]:
    """Return `shift_factor` and `scaling_factor` of diffusers: mean and 1 / standard deviation over all channels.

    Raises: ValueError if the variance is 0.
    """
    mean, square = np.array(statistics.mean), np.array(statistics.std) ** 2 + np.array(statistics.mean) ** 2
    shift = float(mean.mean())
    variance = float(square.mean()) - shift**2
    if variance <= 0:
        raise ValueError("all latents of leaves are equal, so they cannot be scaled; train the model further")
    return shift, 1 / math.sqrt(variance)
