"""Batches on the device. Threads read ahead of the consumer, in order, into memory that is reused."""

from __future__ import annotations

import queue
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.shards.order import MicroBatchPlan, SampleRef
from msvae.shards.reader import BadSample, BatchReader, ShardReader


@dataclass(frozen=True)
class Batch:
    """Tiles (B, C, H, W) and leaf mask (B, 1, H, W) bool on the device, and the keys of the samples."""

    tiles: Tensor
    leaf_mask: Tensor
    keys: tuple[str, ...]
    plan: MicroBatchPlan
    bad: tuple[BadSample, ...] = ()
    """Samples that could not be read. Other samples replace them in the batch."""

    @property
    def slots(self) -> list[int]:
        """Index of each sample in the global batch, or in the split in evaluation."""
        return [sample.slot for sample in self.plan.samples]


KeyOrReplacement = tuple[str, BadSample | None]
"""Key of the sample that was read, and the bad sample that it replaces, if any."""


class Loader:
    """Iterates over the batches of `plans`, in order. `num_workers` threads read ahead of the consumer.

    Args:
        reader: the samples of a split.
        plans: the samples of each batch.
        batch_size: largest number of samples in a plan.
        num_workers: number of threads; with 0 each batch is read when it is requested.
        device: device of the tensors.
        max_bad_samples: limit of samples that cannot be read and are replaced; one more is an error.
        stored: keep tiles in their stored type instead of float32 reflectance.
    """

    def __init__(
        self,
        reader: ShardReader,
        plans: Iterator[MicroBatchPlan],
        *,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        max_bad_samples: int = 0,
        stored: bool = False,
    ) -> None:
        self._plans = plans
        self._batch_reader = BatchReader(reader, max_bad_samples)
        staging = PinnedStaging if device.type == "cuda" else HostStaging
        self._staging: Staging = staging(reader, self._batch_reader, batch_size, device, stored)
        self._num_ahead = max(1, 2 * num_workers)
        self._threads = ThreadPoolExecutor(num_workers, "msvae-reader") if num_workers else None

    def __iter__(self) -> Iterator[Batch]:
        pending: deque[tuple[MicroBatchPlan, Future[Any]]] = deque()
        try:
            while self._schedule(pending):
                plan, filled = pending.popleft()
                tiles, leaf_mask, samples = self._staging.to_device(filled.result())
                bad = tuple(bad for _, bad in samples if bad is not None)
                yield Batch(tiles, leaf_mask, tuple(key for key, _ in samples), plan, bad)
        finally:
            for _, unread in pending:
                unread.cancel()
            if self._threads is not None:
                self._threads.shutdown(wait=True)
            self._batch_reader.close()

    def _schedule(self, pending: deque[tuple[MicroBatchPlan, Future[Any]]]) -> bool:
        while len(pending) < self._num_ahead and (plan := next(self._plans, None)) is not None:
            pending.append((plan, self._read(plan)))
        return bool(pending)

    def _read(self, plan: MicroBatchPlan) -> Future[Any]:
        if self._threads is not None:
            return self._threads.submit(self._staging.fill, plan)
        filled: Future[Any] = Future()
        filled.set_result(self._staging.fill(plan))
        return filled


class Staging(Protocol):
    """Host memory between the shards and the device."""

    def fill(self, plan: MicroBatchPlan) -> Any:
        """Read the samples of a plan into host memory. Several reader threads call this at once."""

    def to_device(self, filled: Any) -> tuple[Tensor, Tensor, list[KeyOrReplacement]]:
        """Return tiles (B, C, H, W) and leaf mask (B, 1, H, W) on the device, and the samples that were read.

        The consumer calls this once for each result of `fill`, in any order.
        """


_Filled = tuple[NDArray[Any], NDArray[np.bool_], list[KeyOrReplacement]]


class HostStaging:
    """Staging for a CPU. The thread that reads a tile also converts it, while the tile is in its cache."""

    def __init__(
        self, reader: ShardReader, batch_reader: BatchReader, batch_size: int, device: torch.device, stored: bool
    ) -> None:
        self._reader, self._batch_reader, self._device = reader, batch_reader, device
        self._stored = None if stored else _RecycledArrays((1, *reader.tile_shape), reader.dtype)
        dtype = reader.dtype if stored else np.dtype(np.float32)
        self._tiles = _RecycledArrays((batch_size, *reader.tile_shape), dtype)
        self._masks = _RecycledArrays((batch_size, 1, *reader.tile_shape[1:]), np.dtype(np.bool_))
        self._scale, self._offset = (
            np.array(values, np.float32)[:, None, None] for values in (reader.manifest.scale, reader.manifest.offset)
        )

    def fill(self, plan: MicroBatchPlan) -> _Filled:
        """Read the samples of a plan and convert their tiles to reflectance."""
        size = len(plan.samples)
        tiles, masks = self._tiles.take(size), self._masks.take(size)

        def read(i: int, sample: SampleRef) -> KeyOrReplacement:
            if self._stored is None:
                return _read_into(self._reader, self._batch_reader, sample, tiles[i], masks[i, 0])
            stored = self._stored.take(1)
            found = _read_into(self._reader, self._batch_reader, sample, stored[0], masks[i, 0])
            np.multiply(stored[0], self._scale, out=tiles[i])
            if self._offset.any():
                np.add(tiles[i], self._offset, out=tiles[i])
            return found

        return tiles, masks, self._batch_reader.map(read, plan)

    def to_device(self, filled: _Filled) -> tuple[Tensor, Tensor, list[KeyOrReplacement]]:
        """Return tensors that share the memory of the arrays, which is used again when the last tensor is freed."""
        tiles, masks, samples = filled
        return torch.from_numpy(tiles).to(self._device), torch.from_numpy(masks).to(self._device), samples


class PinnedStaging:
    """Staging for CUDA. Tiles are copied in their stored type from pinned memory, and converted on the GPU."""

    def __init__(
        self, reader: ShardReader, batch_reader: BatchReader, batch_size: int, device: torch.device, stored: bool
    ) -> None:
        if str(device) == "cuda":  # a run on one GPU; set_device requires an index
            device = torch.device("cuda", torch.cuda.current_device())
        self._reader, self._batch_reader, self._batch_size, self._device = reader, batch_reader, batch_size, device
        self._keep_stored = stored
        self._free: queue.SimpleQueue[_PinnedBuffer] = queue.SimpleQueue()
        per_band = (1, len(reader.manifest.bands), 1, 1)
        self._scale, self._offset = (
            torch.tensor(values, device=device).view(per_band)
            for values in (reader.manifest.scale, reader.manifest.offset)
        )

    def fill(self, plan: MicroBatchPlan) -> tuple[_PinnedBuffer, list[KeyOrReplacement]]:
        """Read the samples of a plan into a buffer whose previous content has been copied to the GPU."""
        # a new thread uses GPU 0 until another device is set, even if this rank trains on another GPU
        torch.cuda.set_device(self._device)
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = _PinnedBuffer(self._reader, self._batch_size)
        buffer.copied.synchronize()
        tiles, masks = buffer.tiles.numpy(), buffer.leaf_mask.numpy()

        def read(i: int, sample: SampleRef) -> KeyOrReplacement:
            return _read_into(self._reader, self._batch_reader, sample, tiles[i], masks[i, 0])

        return buffer, self._batch_reader.map(read, plan)

    def to_device(
        self, filled: tuple[_PinnedBuffer, list[KeyOrReplacement]]
    ) -> tuple[Tensor, Tensor, list[KeyOrReplacement]]:
        """Return copies on the GPU. The buffer is used again after the copy."""
        buffer, samples = filled
        stored = buffer.tiles[: len(samples)].to(self._device, non_blocking=True)
        leaf_mask = buffer.leaf_mask[: len(samples)].to(self._device, non_blocking=True)
        buffer.copied.record(torch.cuda.current_stream(self._device))
        self._free.put(buffer)
        if self._keep_stored:
            return stored, leaf_mask, samples
        return stored.to(torch.float32, copy=True).mul_(self._scale).add_(self._offset), leaf_mask, samples


def _read_into(
    reader: ShardReader,
    batch_reader: BatchReader,
    sample: SampleRef,
    tile_CHW: NDArray[Any],
    leaf_HW: NDArray[np.bool_],
) -> KeyOrReplacement:
    return batch_reader.read(sample, lambda shard, row: reader.read_into(shard, row, tile_CHW, leaf_HW))


class _PinnedBuffer:
    """Pinned memory of one batch, and the event that marks the end of its copy to the GPU."""

    def __init__(self, reader: ShardReader, batch_size: int) -> None:
        dtype: torch.dtype = getattr(torch, reader.dtype.name)
        self.tiles = torch.empty((batch_size, *reader.tile_shape), dtype=dtype, pin_memory=True)
        self.leaf_mask = torch.empty((batch_size, 1, *reader.tile_shape[1:]), dtype=torch.bool, pin_memory=True)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]


class _RecycledArrays:
    """Arrays of one shape and type. Each is used again when no array or tensor refers to it.

    The array that was freed last is taken first, because it is most likely still in a cache.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._shape, self._dtype = shape, dtype
        self._free: list[NDArray[Any]] = []

    def take(self, length: int) -> NDArray[Any]:
        """Return the first `length` entries of a free array.

        The caller must keep the returned array itself, because views of it do not keep its memory reserved.
        """
        try:
            array = self._free.pop()
        except IndexError:
            array = np.empty(self._shape, self._dtype)
        taken = array[:length]
        weakref.finalize(taken, self._free.append, array).atexit = False
        return taken
