"""Where tiles wait between the shard and the model: memory that is used again instead of allocated for every batch."""

from __future__ import annotations

import queue
import weakref
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.shards.order import MicroBatchPlan
from msvae.shards.reader import ShardReader

Keys = tuple[str, ...]


class Staging(Protocol):
    """Reads batches into memory of its own and hands them over as tensors on the device."""

    def fill(self, plan: MicroBatchPlan) -> Any:
        """Read the samples of a plan; called by reader threads, several at once."""

    def hand_over(self, filled: Any) -> tuple[Tensor, Tensor, Keys]:
        """Tiles (B, C, H, W) float32 reflectance and leaf mask (B, 1, H, W) bool on the device, and keys.

        Called by the consumer, once for each `fill`, in any order.
        """


def staging_for(device: torch.device, reader: ShardReader, batch_size: int) -> Staging:
    """The staging that suits a device."""
    staging = PinnedStaging if device.type == "cuda" else HostStaging
    return staging(reader, batch_size, device)


class HostStaging:
    """For a CPU: each tile becomes reflectance while it is still in the cache of the thread that read it."""

    def __init__(self, reader: ShardReader, batch_size: int, device: torch.device) -> None:
        self._reader, self._device = reader, device
        channels, height, width = reader.tile_shape
        self._tiles = _Recycled((batch_size, channels, height, width), np.dtype(np.float32))
        self._masks = _Recycled((batch_size, 1, height, width), np.dtype(np.bool_))
        self._stored = _Recycled((1, *reader.tile_shape), reader.dtype)
        self._scale, self._offset = (
            np.array(values, np.float32)[:, None, None] for values in (reader.manifest.scale, reader.manifest.offset)
        )

    def fill(self, plan: MicroBatchPlan) -> tuple[NDArray[np.float32], NDArray[np.bool_], Keys]:
        """Read, scale and offset."""
        size = len(plan.places)
        tiles, masks, stored = self._tiles.take(size), self._masks.take(size), self._stored.take(1)
        keys = []
        for i, place in enumerate(plan.places):
            keys.append(self._reader.read_into(place.shard, place.row, stored[0], masks[i, 0]))
            np.multiply(stored[0], self._scale, out=tiles[i])
            if self._offset.any():
                np.add(tiles[i], self._offset, out=tiles[i])
        return tiles, masks, tuple(keys)

    def hand_over(self, filled: tuple[NDArray[np.float32], NDArray[np.bool_], Keys]) -> tuple[Tensor, Tensor, Keys]:
        """The arrays themselves on a CPU; their memory is used again when the last tensor that sees it is gone."""
        tiles, masks, keys = filled
        return torch.from_numpy(tiles).to(self._device), torch.from_numpy(masks).to(self._device), keys


class PinnedStaging:
    """For CUDA: tiles cross in their stored type from pinned memory, and become reflectance on the GPU."""

    def __init__(self, reader: ShardReader, batch_size: int, device: torch.device) -> None:
        self._reader, self._batch_size, self._device = reader, batch_size, device
        self._free: queue.SimpleQueue[_Pinned] = queue.SimpleQueue()
        per_band = (1, len(reader.manifest.bands), 1, 1)
        self._scale, self._offset = (
            torch.tensor(values, device=device).view(per_band)
            for values in (reader.manifest.scale, reader.manifest.offset)
        )

    def fill(self, plan: MicroBatchPlan) -> tuple[_Pinned, Keys]:
        """Read in stored integers, once the GPU has copied what was there."""
        # a new thread's device is GPU 0, whichever this rank trains on
        torch.cuda.set_device(self._device)
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = _Pinned(self._reader, self._batch_size)
        buffer.copied.synchronize()
        tiles, masks = buffer.tiles.numpy(), buffer.leaf_mask.numpy()
        keys = [self._reader.read_into(p.shard, p.row, tiles[i], masks[i, 0]) for i, p in enumerate(plan.places)]
        return buffer, tuple(keys)

    def hand_over(self, filled: tuple[_Pinned, Keys]) -> tuple[Tensor, Tensor, Keys]:
        """Copies on the GPU; the buffer is free once they are made."""
        buffer, keys = filled
        stored = buffer.tiles[: len(keys)].to(self._device, non_blocking=True)
        leaf_mask = buffer.leaf_mask[: len(keys)].to(self._device, non_blocking=True)
        buffer.copied.record()
        self._free.put(buffer)
        return stored.to(torch.float32, copy=True).mul_(self._scale).add_(self._offset), leaf_mask, keys


class _Pinned:
    def __init__(self, reader: ShardReader, batch_size: int) -> None:
        dtype: torch.dtype = getattr(torch, reader.dtype.name)
        self.tiles = torch.empty((batch_size, *reader.tile_shape), dtype=dtype, pin_memory=True)
        self.leaf_mask = torch.empty((batch_size, 1, *reader.tile_shape[1:]), dtype=torch.bool, pin_memory=True)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]


class _Recycled:
    """Arrays of one shape and type, each taken again once no array or tensor looks at it any more."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._shape, self._dtype = shape, dtype
        self._free: queue.SimpleQueue[NDArray[Any]] = queue.SimpleQueue()

    def take(self, length: int) -> NDArray[Any]:
        """The first `length` entries of one. Keep this very array: views of it do not keep the memory taken."""
        try:
            array = self._free.get_nowait()
        except queue.Empty:
            array = np.empty(self._shape, self._dtype)
        taken = array[:length]
        weakref.finalize(taken, self._free.put, array).atexit = False
        return taken
