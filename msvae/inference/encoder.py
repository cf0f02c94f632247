"""A model that turns batches of tiles into the latents that are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from msvae.inference.identity import model_sha256
from msvae.inference.latent_statistics import leaf_sums
from msvae.inference.load import fitting_into_memory
from msvae.losses.coverage import latent_coverage
from msvae.messages import counted
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.shards.loader import Batch
from msvae.shards.order import hash_key
from msvae.shards.tile_codec import npy_header

Kind = Literal["moments", "sample"]
Precision = Literal["float32", "float16"]


@dataclass(frozen=True)
class EncodeOptions:
    """What latents are stored.

    Raises: ValueError for a value that cannot be met.
    """

    kind: Kind = "moments"
    """Mean and log variance, or one draw from the posterior."""
    dtype: Precision = "float32"
    seed: int = 0
    """Of the draws; each also depends on the key of its sample alone."""
    batch_size: int = 8
    """Tiles that the model takes at once; none of two shards."""

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--kind", self.kind, get_args(Kind)),
            ("--dtype", self.dtype, get_args(Precision)),
        ):
            if value not in known:
                raise ValueError(f"got {option} {value}, expected {' or '.join(known)}")
        if self.batch_size < 1:
            raise ValueError(f"got --batch-size {self.batch_size}, expected 1 or more")


class Encoder:
    """A model, and the form in which its latents are stored."""

    def __init__(self, model: AutoencoderKLMultispectralAdapter, options: EncodeOptions) -> None:
        self.model, self.options = model, options
        self.sha256 = model_sha256(model)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Iterator[tuple[str, bytes, NDArray[np.bool_], NDArray[np.float64]]]:
        """Of each sample: key, latents as an `.npy` file, leaf mask (H, W), and sums over its leaf cells.

        Raises: ValueError when latents are not finite, or too large for their type.
        """
        with fitting_into_memory(counted(len(batch.tiles), "tile"), batch.tiles, "--batch-size"):
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
            yield key, npy_header(stored.shape, stored.dtype) + stored.tobytes(), leaf > 0, sums

    def _stored(self, key: str, mean: NDArray[np.float32], logvar: NDArray[np.float32]) -> NDArray[np.floating]:
        if self.options.kind == "moments":
            latents = np.concatenate([mean, logvar])
        else:
            number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
            generator = torch.Generator().manual_seed(hash_key(self.options.seed, number) >> 1)
            latents = mean + np.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).numpy()
        with np.errstate(over="ignore"):
            return latents.astype(np.dtype(self.options.dtype).newbyteorder("<"))
