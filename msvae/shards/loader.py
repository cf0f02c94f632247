"""Batches on the device: reader threads fill a few reused buffers ahead of the training loop."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from msvae.shards.order import MicroBatchPlan
from msvae.shards.reader import ShardReader


@dataclass(frozen=True)
class Batch:
    """Tiles (B, C, H, W) float32 reflectance, leaf mask (B, 1, H, W) bool, both on the device; keys in order."""

    tiles: Tensor
    leaf_mask: Tensor
    keys: tuple[str, ...]
    plan: MicroBatchPlan


class _Buffer:
    """Host memory for one batch in stored integers, pinned where a GPU reads it."""

    def __init__(self, batch_size: int, reader: ShardReader, pinned: bool) -> None:
        dtype: torch.dtype = getattr(torch, reader.dtype.name)
        self.tiles = torch.empty((batch_size, *reader.tile_shape), dtype=dtype, pin_memory=pinned)
        self.leaf_mask = torch.empty((batch_size, 1, *reader.tile_shape[1:]), dtype=torch.bool, pin_memory=pinned)
        self.copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def fill(self, plan: MicroBatchPlan, reader: ShardReader) -> tuple[str, ...]:
        if self.copied is not None:
            self.copied.synchronize()
        tiles, masks = self.tiles.numpy(), self.leaf_mask.numpy()
        return tuple(
            reader.read_into(place.shard, place.row, tiles[i], masks[i, 0]) for i, place in enumerate(plan.places)
        )


class Loader:
    """Iterates over `plans`, reading `num_workers` batches at once ahead of the consumer, in order.

    Tiles cross to the device in their stored type and become reflectance there. Without workers each batch is
    read when it is asked for.
    """

    def __init__(
        self,
        reader: ShardReader,
        plans: Iterator[MicroBatchPlan],
        *,
        batch_size: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self._reader, self._plans, self._device = reader, plans, device
        self._num_ahead = max(1, 2 * num_workers)
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(self._num_ahead):
            self._buffers.put(_Buffer(batch_size, reader, pinned=device.type == "cuda"))
        per_band = (1, len(reader.manifest.bands), 1, 1)
        self._scale = torch.tensor(reader.manifest.scale, device=device).view(per_band)
        self._offset = torch.tensor(reader.manifest.offset, device=device).view(per_band)
        self._threads = _reader_threads(num_workers, device) if num_workers else None

    def __iter__(self) -> Iterator[Batch]:
        pending: deque[tuple[MicroBatchPlan, _Buffer, Future[tuple[str, ...]]]] = deque()
        try:
            while self._schedule(pending):
                plan, buffer, keys = pending.popleft()
                yield self._to_device(plan, buffer, keys.result())
        finally:
            for _, _, unread in pending:
                unread.cancel()
            if self._threads is not None:
                self._threads.shutdown(wait=True)

    def _schedule(self, pending: deque[tuple[MicroBatchPlan, _Buffer, Future[tuple[str, ...]]]]) -> bool:
        while len(pending) < self._num_ahead and (plan := next(self._plans, None)) is not None:
            buffer = self._buffers.get_nowait()
            pending.append((plan, buffer, self._read(plan, buffer)))
            if self._threads is None:
                break
        return bool(pending)

    def _read(self, plan: MicroBatchPlan, buffer: _Buffer) -> Future[tuple[str, ...]]:
        if self._threads is not None:
            return self._threads.submit(buffer.fill, plan, self._reader)
        keys: Future[tuple[str, ...]] = Future()
        keys.set_result(buffer.fill(plan, self._reader))
        return keys

    def _to_device(self, plan: MicroBatchPlan, buffer: _Buffer, keys: tuple[str, ...]) -> Batch:
        stored = buffer.tiles[: len(keys)].to(self._device, non_blocking=True)
        leaf_mask = buffer.leaf_mask[: len(keys)].to(self._device, non_blocking=True, copy=True)
        tiles = stored.to(torch.float32, copy=True).mul_(self._scale).add_(self._offset)
        if buffer.copied is not None:
            buffer.copied.record()
        self._buffers.put(buffer)
        return Batch(tiles, leaf_mask, keys, plan)


def _reader_threads(num_workers: int, device: torch.device) -> ThreadPoolExecutor:
    if device.type != "cuda":
        return ThreadPoolExecutor(num_workers, "msvae-reader")
    # a new thread's device is GPU 0, whichever this rank trains on
    return ThreadPoolExecutor(num_workers, "msvae-reader", initializer=torch.cuda.set_device, initargs=(device,))
