"""The order of samples: a pure function of (shard sizes, seed, epoch), the same for all ranks and restarts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHUFFLE_WINDOW_SHARDS = 64
"""Number of shards whose samples are shuffled together: few enough for caches, many enough for training."""


class SampleRef(NamedTuple):
    """Shard and row of one sample, and its slot: its index in the global batch, or in the split in evaluation."""

    shard: int
    row: int
    slot: int


class MicroBatchPlan(NamedTuple):
    """The samples that one rank passes through the model at once.

    `batch_index` is the index of the global batch in training, and of the batch in evaluation.
    """

    batch_index: int
    samples: tuple[SampleRef, ...]


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return hashes of 64-bit integers (Steele, Lea, Flood 2014), the same on every machine and library version."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_key(*key: int) -> int:
    """Return one 64-bit hash of several integers."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = splitmix64(state ^ np.array([part % 2**64], np.uint64))
    return int(state[0])


def permutation(length: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of `range(length)` that depends on `key` alone."""
    scores = splitmix64(np.arange(length, dtype=np.uint64) ^ np.uint64(hash_key(*key)))
    return np.argsort(scores, kind="stable")


class SampleOrder:
    """The endless sequence of training samples.

    In each epoch the shards are shuffled and cut into shuffle windows of 64 shards, and the samples of each window are
    shuffled. If the last samples of an epoch are too few for a global batch, the next epoch completes the batch.
    """

    def __init__(
        self, samples_per_shard: Sequence[int], seed: int, window_shards: int = SHUFFLE_WINDOW_SHARDS
    ) -> None:
        self._sizes = np.asarray(samples_per_shard, dtype=np.int64)
        self._seed = seed
        self._window_shards = window_shards
        self.num_samples = int(self._sizes.sum())
        self._epoch = lru_cache(maxsize=2)(self._shuffle_shards)
        self._window = lru_cache(maxsize=4)(self._shuffle_window)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (shard, row) of the sample at `index` in the endless sequence."""
        epoch, offset = divmod(index, self.num_samples)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        shard, row = self._window(epoch, window)[offset - int(starts[window])]
        return int(shard), int(row)

    def samples(self, batch_index: int, global_batch_size: int, slots: Iterable[int]) -> list[SampleRef]:
        """Return the samples in some slots of a global batch."""
        return [SampleRef(*self.locate(batch_index * global_batch_size + slot), slot) for slot in slots]

    def _shuffle_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shards of an epoch in order, and the index of the first sample of each shuffle window."""
        shards = permutation(len(self._sizes), self._seed, epoch)
        boundaries = np.concatenate([[0], np.cumsum(self._sizes[shards])])
        return shards, boundaries[:: self._window_shards]

    def _shuffle_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return (shard, row) of the samples of a shuffle window, (N, 2)."""
        shards, _ = self._epoch(epoch)
        chosen = shards[window * self._window_shards : (window + 1) * self._window_shards]
        samples = np.concatenate(
            [np.stack([np.full(n, s), np.arange(n)], 1) for s, n in zip(chosen, self._sizes[chosen], strict=True)]
        )
        mixed: NDArray[np.int64] = samples[permutation(len(samples), self._seed, epoch, window)]
        return mixed


def training_plans(
    order: SampleOrder,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    position: int,
) -> Iterator[MicroBatchPlan]:
    """Yield this rank's micro batches from global batch `position` on, without end.

    The rank's share of a global batch is one contiguous slice, which is cut into micro batches in order.
    """
    share = global_batch_size // world_size
    while True:
        for start in range(rank * share, (rank + 1) * share, micro_batch_size):
            slots = range(start, start + micro_batch_size)
            yield MicroBatchPlan(position, tuple(order.samples(position, global_batch_size, slots)))
        position += 1


def stored_order(samples_per_shard: Sequence[int]) -> list[SampleRef]:
    """Return every sample of a split in stored order. The slot of a sample is its index in the split."""
    rows = ((shard, row) for shard, count in enumerate(samples_per_shard) for row in range(count))
    return [SampleRef(shard, row, slot) for slot, (shard, row) in enumerate(rows)]


def in_micro_batches(samples: Iterable[SampleRef], batch_size: int) -> Iterator[MicroBatchPlan]:
    """Cut samples into micro batches, numbered from 0. The last one may be smaller."""
    remaining, batch_index = iter(samples), 0
    while chunk := tuple(islice(remaining, batch_size)):
        yield MicroBatchPlan(batch_index, chunk)
        batch_index += 1


def evaluation_plans(
    samples_per_shard: Sequence[int], *, batch_size: int, rank: int, world_size: int
) -> Iterator[MicroBatchPlan]:
    """Yield this rank's batches of a split: every sample once, in stored order.

    The batches do not depend on the number of ranks; batch i belongs to rank i modulo `world_size`.
    """
    return islice(in_micro_batches(stored_order(samples_per_shard), batch_size), rank, None, world_size)


def evenly_spaced_samples(samples_per_shard: Sequence[int], count: int) -> list[SampleRef]:
    """Return at most `count` samples, in stored order and evenly spaced over a split."""
    ends = np.cumsum(samples_per_shard)
    total = int(ends[-1])
    slots = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
    shards = np.searchsorted(ends, slots, side="right")
    rows = slots - np.concatenate([[0], ends])[shards]
    return [SampleRef(*map(int, sample)) for sample in zip(shards, rows, slots, strict=True)]
