"""Where tiles wait between the shard and the model: memory that is used again instead of allocated for every batch."""

from __future__ import annotations

import queue
import weakref
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.shards.order import MicroBatchPlan, SampleRef
from msvae.shards.reader import ShardReader
from msvae.shards.samples import Sample, SampleReads


class Staging(Protocol):
    """Reads batches into memory of its own and hands them over as tensors on the device."""

    def fill(self, plan: MicroBatchPlan) -> Any:
        """Read the samples of a plan; called by reader threads, several at once."""

    def hand_over(self, filled: Any) -> tuple[Tensor, Tensor, list[Sample]]:
        """Tiles (B, C, H, W), leaf mask (B, 1, H, W) bool, both on the device, and samples.

        Called by the consumer, once for each `fill`, in any order.
        """


_Filled = tuple[NDArray[Any], NDArray[np.bool_], list[Sample]]


class HostStaging:
    """For a CPU: each tile becomes float32 reflectance while it is still in the cache of the thread that read it.

    With `stored` it stays as it is stored.
    """

    def __init__(
        self, reader: ShardReader, reads: SampleReads, batch_size: int, device: torch.device, stored: bool
    ) -> None:
        self._reads, self._device = reads, device
        self._stored = None if stored else _Recycled((1, *reader.tile_shape), reader.dtype)
        dtype = reader.dtype if stored else np.dtype(np.float32)
        self._tiles = _Recycled((batch_size, *reader.tile_shape), dtype)
        self._masks = _Recycled((batch_size, 1, *reader.tile_shape[1:]), np.dtype(np.bool_))
        self._scale, self._offset = (
            np.array(values, np.float32)[:, None, None] for values in (reader.manifest.scale, reader.manifest.offset)
        )

    def fill(self, plan: MicroBatchPlan) -> _Filled:
        """Read, and scale and offset."""
        size = len(plan.samples)
        tiles, masks = self._tiles.take(size), self._masks.take(size)

        def read(i: int, place: SampleRef) -> Sample:
            if self._stored is None:
                return self._reads.read_into(place, tiles[i], masks[i, 0])
            stored = self._stored.take(1)
            sample = self._reads.read_into(place, stored[0], masks[i, 0])
            np.multiply(stored[0], self._scale, out=tiles[i])
            if self._offset.any():
                np.add(tiles[i], self._offset, out=tiles[i])
            return sample

        return tiles, masks, self._reads.each(read, plan)

    def hand_over(self, filled: _Filled) -> tuple[Tensor, Tensor, list[Sample]]:
        """The arrays themselves on a CPU; their memory is used again when the last tensor that sees it is gone."""
        tiles, masks, samples = filled
        return torch.from_numpy(tiles).to(self._device), torch.from_numpy(masks).to(self._device), samples


class PinnedStaging:
    """For CUDA: tiles cross in their stored type from pinned memory, and become float32 reflectance on the GPU.

    With `stored` they stay as they are stored.
    """

    def __init__(
        self, reader: ShardReader, reads: SampleReads, batch_size: int, device: torch.device, stored: bool
    ) -> None:
        if str(device) == "cuda":  # of a run on one GPU; set_device wants a number
            device = torch.device("cuda", torch.cuda.current_device())
        self._reader, self._reads, self._batch_size, self._device = reader, reads, batch_size, device
        self._keep_stored = stored
        self._free: queue.SimpleQueue[_Pinned] = queue.SimpleQueue()
        per_band = (1, len(reader.manifest.bands), 1, 1)
        self._scale, self._offset = (
            torch.tensor(values, device=device).view(per_band)
            for values in (reader.manifest.scale, reader.manifest.offset)
        )

    def fill(self, plan: MicroBatchPlan) -> tuple[_Pinned, list[Sample]]:
        """Read in stored integers, once the GPU has copied what was there."""
        # a new thread's device is GPU 0, whichever this rank trains on
        torch.cuda.set_device(self._device)
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = _Pinned(self._reader, self._batch_size)
        buffer.copied.synchronize()
        tiles, masks = buffer.tiles.numpy(), buffer.leaf_mask.numpy()
        return buffer, self._reads.each(lambda i, p: self._reads.read_into(p, tiles[i], masks[i, 0]), plan)

    def hand_over(self, filled: tuple[_Pinned, list[Sample]]) -> tuple[Tensor, Tensor, list[Sample]]:
        """Copies on the GPU; the buffer is free once they are made."""
        buffer, samples = filled
        stored = buffer.tiles[: len(samples)].to(self._device, non_blocking=True)
        leaf_mask = buffer.leaf_mask[: len(samples)].to(self._device, non_blocking=True)
        buffer.copied.record(torch.cuda.current_stream(self._device))
        self._free.put(buffer)
        if self._keep_stored:
            return stored, leaf_mask, samples
        return stored.to(torch.float32, copy=True).mul_(self._scale).add_(self._offset), leaf_mask, samples


class _Pinned:
    def __init__(self, reader: ShardReader, batch_size: int) -> None:
        dtype: torch.dtype = getattr(torch, reader.dtype.name)
        self.tiles = torch.empty((batch_size, *reader.tile_shape), dtype=dtype, pin_memory=True)
        self.leaf_mask = torch.empty((batch_size, 1, *reader.tile_shape[1:]), dtype=torch.bool, pin_memory=True)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]


class _Recycled:
    """Arrays of one shape and type, each taken again once no array or tensor looks at it any more.

    The one that became free last is taken first: it is the likeliest to be in a cache still.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._shape, self._dtype = shape, dtype
        self._free: list[NDArray[Any]] = []

    def take(self, length: int) -> NDArray[Any]:
        """The first `length` entries of one. Keep this very array: views of it do not keep the memory taken."""
        try:
            array = self._free.pop()
        except IndexError:
            array = np.empty(self._shape, self._dtype)
        taken = array[:length]
        weakref.finalize(taken, self._free.append, array).atexit = False
        return taken
