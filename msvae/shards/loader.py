"""Batches on the device: reader threads read ahead of the training loop, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msvae.shards.order import MicroBatchPlan
from msvae.shards.reader import ShardReader
from msvae.shards.samples import BadSample, SampleReads
from msvae.shards.staging import HostStaging, PinnedStaging, Staging


@dataclass(frozen=True)
class Batch:
    """Tiles (B, C, H, W), leaf mask (B, 1, H, W) bool, both on the device; keys in order."""

    tiles: Tensor
    leaf_mask: Tensor
    keys: tuple[str, ...]
    plan: MicroBatchPlan
    bad: tuple[BadSample, ...] = ()
    """Samples that could not be read; others stand in their places."""


class Loader:
    """Iterates over `plans`, reading `num_workers` batches at once ahead of the consumer, in order.

    Without workers each batch is read when it is asked for. Up to `max_bad_samples` that cannot be read are replaced.
    Tiles are float32 reflectance, or with `stored` as they are stored.
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
        self._reads = SampleReads(reader, max_bad_samples)
        staging = PinnedStaging if device.type == "cuda" else HostStaging
        self._staging: Staging = staging(reader, self._reads, batch_size, device, stored)
        self._num_ahead = max(1, 2 * num_workers)
        self._threads = ThreadPoolExecutor(num_workers, "msvae-reader") if num_workers else None

    def __iter__(self) -> Iterator[Batch]:
        pending: deque[tuple[MicroBatchPlan, Future[Any]]] = deque()
        try:
            while self._schedule(pending):
                plan, filled = pending.popleft()
                tiles, leaf_mask, samples = self._staging.hand_over(filled.result())
                bad = tuple(sample.bad for sample in samples if sample.bad is not None)
                yield Batch(tiles, leaf_mask, tuple(sample.key for sample in samples), plan, bad)
        finally:
            for _, unread in pending:
                unread.cancel()
            if self._threads is not None:
                self._threads.shutdown(wait=True)
            self._reads.close()

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
