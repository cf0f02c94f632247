"""Read shards of latents: a WebDataset tar and an index for every tar of tiles, and a manifest of their own format.

Members of a sample are `KEY.latents.npy`, `KEY.mask.png` (1-bit mask of the tile) and `KEY.json` of the tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt, ValidationError

from msvae.bands import Bands
from msvae.shards.manifest import MANIFEST_NAME, ShardIndex, Shards
from msvae.shards.sample_codec import decode_mask_into, npy_header
from msvae.shards.stores import open_store
from msvae.shards.stores.store import MissingError, Store

LATENTS_ENDING = "latents.npy"
"""Ending of the member with the latents."""


class LatentStatistics(BaseModel):
    """Statistics of latents sampled from the posterior, over leaf cells weighted by their share of leaf pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_cells: NonNegativeFloat
    """Sum of the weights."""
    mean: list[float]
    """Mean of each channel."""
    std: list[float]
    """Standard deviation of each channel."""


class LatentManifest(BaseModel):
    """A split of latents: their kind and shape, the model and tiles that they come from, and their shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["msvae-latents"] = "msvae-latents"
    version: Literal[1] = 1
    kind: Literal["moments", "sample"]
    """Moments: mean and log variance of the posterior, concatenated along channels. Sample: one sample of it."""
    seed: int | None
    """Seed of the samples, None for moments."""
    dtype: Literal["float16", "float32"]
    latent_channels: PositiveInt
    cells: PositiveInt
    """Number of latent cells along a side of a tile."""
    tile_px: PositiveInt
    band_names: list[str]
    wavelengths_nm: list[float]
    model_sha256: str
    """SHA-256 of everything that affects encoding and decoding: weights, adapters, leaf statistics."""
    tiles_sha256: str
    """Digest of the manifest of the tiles."""
    shift_factor: float
    scaling_factor: float
    """Factor for diffusion models, which learn (latent - shift_factor) * scaling_factor."""
    statistics: LatentStatistics
    """Statistics of the training split, the same in every split."""
    shards: Shards

    @property
    def bands(self) -> Bands:
        """Bands of decoded tiles."""
        return Bands(tuple(self.wavelengths_nm), tuple(self.band_names))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the stored array of a sample."""
        return self.latent_channels * (2 if self.kind == "moments" else 1), self.cells, self.cells

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(self.shards.num_samples)

    @classmethod
    def load(cls, store: Store) -> LatentManifest:
        """Read `manifest.json`.

        Raises: ValueError if it is missing, or not a manifest of latents.
        """
        path = store.path(MANIFEST_NAME)
        try:
            return cls.model_validate_json(store.read(MANIFEST_NAME))
        except MissingError:
            raise ValueError(f"{path} is missing; make latents with `msvae encode MODEL SHARDS OUT`") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(
                f"{path} is not a manifest of latents ({field}: {first['msg']}); make them with `msvae encode`"
            ) from error


class LatentSample(NamedTuple):
    """One sample: latents in their stored type, leaf mask (H, W) of its tile, and the bytes of its JSON."""

    key: str
    latents: NDArray[np.floating]
    leaf_mask: NDArray[np.bool_]
    about: bytes


class LatentReader:
    """Random access to the latents of one split, in a folder or at a URL. It is also a torch map-style dataset."""

    def __init__(self, location: str | Path) -> None:
        self.store = open_store(location)
        self.manifest = LatentManifest.load(self.store)
        self._indexes: dict[int, ShardIndex] = {}
        self._ends = np.cumsum(self.manifest.shards.num_samples)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, sample: int) -> LatentSample:
        """Return one sample of the split.

        Raises: IndexError if there is no such sample; ValueError if it was altered.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"got sample {sample} of {len(self)}")
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return self.read(shard, sample - int(self._ends[shard]) + self.manifest.shards.num_samples[shard])

    def samples(self, shard: int) -> Iterator[LatentSample]:
        """Yield the samples of one shard in stored order."""
        return (self.read(shard, row) for row in range(self.manifest.shards.num_samples[shard]))

    def read(self, shard: int, row: int) -> LatentSample:
        """Return one sample of a shard.

        Raises: ValueError if it is missing, altered, or does not match the manifest.
        """
        entry, index = self.manifest.shards[shard], self._index(shard)
        parts = {
            name: self.store.read_span(
                entry.name, getattr(index, f"{name}_offset")[row], getattr(index, f"{name}_bytes")[row]
            )
            for name in ("bands", "mask", "json")
        }
        name = f"{self.store.path(entry.name)}: sample {index.keys[row]}"
        sound = crc32c(parts["mask"], crc32c(parts["bands"])) == index.crc32c[row]
        if not sound or (index.json_crc32c is not None and crc32c(parts["json"]) != index.json_crc32c[row]):
            raise ValueError(f"{name} is truncated or altered; encode this split again")
        dtype, shape = np.dtype(self.manifest.dtype).newbyteorder("<"), self.manifest.shape
        header = npy_header(shape, dtype)
        num_bytes = len(header) + math.prod(shape) * dtype.itemsize
        if not parts["bands"].startswith(header) or len(parts["bands"]) != num_bytes:
            raise ValueError(f"{name} is not a {self.manifest.dtype} array of {self.manifest.shape}; encode again")
        latents = np.frombuffer(parts["bands"], dtype, offset=len(header)).reshape(shape).copy()
        leaf_mask = np.empty((self.manifest.tile_px,) * 2, np.bool_)
        decode_mask_into(parts["mask"], leaf_mask)
        return LatentSample(index.keys[row], latents, leaf_mask, parts["json"])

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            self._indexes[shard] = ShardIndex.load(self.store, self.manifest.shards[shard])
        return self._indexes[shard]
