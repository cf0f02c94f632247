"""The order of samples: a pure function of (shard sizes, seed, epoch), equal for all ranks and restarts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW_SHARDS = 64
"""Shards that are mixed with each other: local enough for caches and range reads, mixed enough to train."""


class SampleRef(NamedTuple):
    """Shard and row of one sample, and its slot: its index in the global batch, or in the split in evaluation."""

    shard: int
    row: int
    slot: int


class MicroBatchPlan(NamedTuple):
    """The samples that one rank puts through the model at once.

    `batch_index` is the index of the global batch in training, and of the batch in evaluation.
    """

    batch_index: int
    samples: tuple[SampleRef, ...]


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit integers (Steele, Lea, Flood 2014); the same on every machine and library version."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash_key(*key: int) -> int:
    """One 64-bit number out of several."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = splitmix64(state ^ np.array([part % 2**64], np.uint64))
    return int(state[0])


def permutation(length: int, *key: int) -> NDArray[np.int64]:
    """A shuffle of `range(length)`, decided by `key` alone."""
    scores = splitmix64(np.arange(length, dtype=np.uint64) ^ np.uint64(hash_key(*key)))
    return np.argsort(scores, kind="stable")


class SampleOrder:
    """The endless sequence of training samples.

    Shards are shuffled, cut into windows of 64, and the samples of each window are shuffled. The last samples
    of an epoch, too few for a global batch, open the first batch of the next.
    """

    def __init__(self, samples_per_shard: Sequence[int], seed: int, window_shards: int = WINDOW_SHARDS) -> None:
        self._sizes = np.asarray(samples_per_shard, dtype=np.int64)
        self._seed = seed
        self._window_shards = window_shards
        self.num_samples = int(self._sizes.sum())
        self._epoch = lru_cache(maxsize=2)(self._shuffle_shards)
        self._window = lru_cache(maxsize=4)(self._shuffle_window)

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, row) of the sample at `index` in the endless sequence."""
        epoch, offset = divmod(index, self.num_samples)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        shard, row = self._window(epoch, window)[offset - int(starts[window])]
        return int(shard), int(row)

    def samples(self, position: int, global_batch_size: int, slots: range) -> list[SampleRef]:
        """The samples at some slots of the global batch at `position`."""
        return [SampleRef(*self.locate(position * global_batch_size + slot), slot) for slot in slots]

    def _shuffle_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shards = permutation(len(self._sizes), self._seed, epoch)
        boundaries = np.concatenate([[0], np.cumsum(self._sizes[shards])])
        return shards, boundaries[:: self._window_shards]

    def _shuffle_window(self, epoch: int, window: int) -> NDArray[np.int64]:
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
    """This rank's micro batches from `position` on: its slice of every global batch, cut in order."""
    share = global_batch_size // world_size
    while True:
        for start in range(rank * share, (rank + 1) * share, micro_batch_size):
            slots = range(start, start + micro_batch_size)
            yield MicroBatchPlan(position, tuple(order.samples(position, global_batch_size, slots)))
        position += 1


def evaluation_plans(
    samples_per_shard: Sequence[int], *, batch_size: int, rank: int, world_size: int
) -> Iterator[MicroBatchPlan]:
    """Every sample once, in stored order, in batches that do not depend on the number of ranks."""
    places = [(shard, row) for shard, count in enumerate(samples_per_shard) for row in range(count)]
    for batch, start in enumerate(range(0, len(places), batch_size)):
        if batch % world_size == rank:
            chunk = places[start : start + batch_size]
            yield MicroBatchPlan(batch, tuple(SampleRef(*place, start + i) for i, place in enumerate(chunk)))
