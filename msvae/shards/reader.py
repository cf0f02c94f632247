"""Random access to the samples of a split: positioned reads straight into the caller's arrays."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray
from PIL import Image

from msvae.shards.manifest import Manifest, ShardEntry, ShardIndex
from msvae.shards.tar import npy_bytes

MAX_OPEN_SHARDS = 256
"""Well under the 1,024 files that a process may hold open by default."""


class ShardReader:
    """The samples of one local split. Safe to use from several threads at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self.tile_shape = (len(self.manifest.bands), self.manifest.tile_px, self.manifest.tile_px)
        self.dtype = np.dtype(self.manifest.dtype)
        empty = npy_bytes(np.zeros(self.tile_shape, self.dtype))
        self._npy_header = empty[: len(empty) - int(np.prod(self.tile_shape)) * self.dtype.itemsize]
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def samples_per_shard(self) -> list[int]:
        """Number of samples in each shard, in manifest order."""
        return self.manifest.shards.num_samples

    def key(self, shard: int, row: int) -> str:
        """The key of one sample."""
        return self._open(shard).index.keys[row]

    def read_into(self, shard: int, row: int, tile: NDArray[Any], leaf_mask: NDArray[np.bool_]) -> str:
        """Read one sample into `tile` (C, H, W), stored type, and `leaf_mask` (H, W); returns its key.

        Raises: ValueError naming shard and key when bytes are missing, altered, or not what the manifest says.
        """
        tar = self._open(shard)
        index = tar.index
        key = index.keys[row]
        place = f"{self.folder / self.manifest.shards[shard].name}: sample {key}"
        if index.bands_bytes[row] != len(self._npy_header) + tile.nbytes:
            raise ValueError(
                f"{place} holds {index.bands_bytes[row]} bytes, expected {len(self._npy_header) + tile.nbytes} "
                f"for {self.dtype} tiles of shape {self.tile_shape}; pack this split again"
            )
        header = bytearray(len(self._npy_header))
        num_read = os.preadv(tar.descriptor, [header, tile.data.cast("B")], index.bands_offset[row])
        png = os.pread(tar.descriptor, index.mask_bytes[row], index.mask_offset[row])
        checksum = crc32c(png, crc32c(tile.data.cast("B"), crc32c(bytes(header))))
        if num_read != index.bands_bytes[row] or checksum != index.crc32c[row]:
            raise ValueError(
                f"{place} is truncated or altered: its checksum is {checksum:08x}, the index expects "
                f"{index.crc32c[row]:08x}; restore the shard from its source or pack this split again"
            )
        if bytes(header) != self._npy_header:
            raise ValueError(f"{place} is not a {self.dtype} array of shape {self.tile_shape}; pack again")
        _decode_mask(png, leaf_mask, place)
        return key

    def _open(self, shard: int) -> _OpenShard:
        with self._lock:
            if shard not in self._open_shards:
                self._open_shards[shard] = _OpenShard(self.folder, self.manifest.shards[shard])
                if len(self._open_shards) > MAX_OPEN_SHARDS:
                    self._open_shards.popitem(last=False)
            self._open_shards.move_to_end(shard)
            return self._open_shards[shard]


class _OpenShard:
    """A tar and its index. The file closes when the last reader lets go of it."""

    def __init__(self, folder: Path, entry: ShardEntry) -> None:
        self.index = ShardIndex.load(folder, entry)
        self.descriptor = -1
        path = folder / entry.name
        if not path.is_file():
            raise ValueError(f"shard {path} is missing; restore it from its source or pack this split again")
        size_bytes = path.stat().st_size
        if size_bytes != entry.size_bytes:
            raise ValueError(
                f"shard {path} has {size_bytes} bytes, the manifest expects {entry.size_bytes}: it was truncated or "
                "replaced; restore it from its source or pack this split again"
            )
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)


def _decode_mask(png: bytes, leaf_mask: NDArray[np.bool_], place: str) -> None:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if image.size != leaf_mask.shape[::-1]:
            raise ValueError(
                f"{place} has a mask of {image.size} px, expected {leaf_mask.shape[::-1]}; pack this split again"
            )
        leaf_mask[:] = np.asarray(image) > 0
