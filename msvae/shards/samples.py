"""Reading the samples of a micro batch: several at once where that pays, and another one for each that is bad."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from msvae.shards.order import MicroBatchPlan, Place
from msvae.shards.reader import ShardReader

T = TypeVar("T")


class BadSample(NamedTuple):
    """A sample that could not be read, and the key of the one that took its place."""

    slot: int
    key: str
    reason: str
    replaced_by: str


class Sample(NamedTuple):
    """What was read into a place."""

    key: str
    bad: BadSample | None = None


class SampleReads:
    """Reads samples of `reader`. Up to `max_bad_samples` that cannot be read are replaced, then it is an error.

    The rule is the same on every rank: the next sample in stored order that can be read; the first follows the last.
    """

    def __init__(self, reader: ShardReader, max_bad_samples: int = 0) -> None:
        self._reader, self._max_bad_samples = reader, max_bad_samples
        self._known_bad: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        parallel = reader.store.parallel_reads
        self._pool = ThreadPoolExecutor(parallel, "msvae-request") if parallel > 1 else None

    def each(self, read: Callable[[int, Place], T], plan: MicroBatchPlan) -> list[T]:
        """`read(i, place)` of every sample of a plan."""
        along = map if self._pool is None else self._pool.map
        return list(along(read, range(len(plan.places)), plan.places))

    def read_into(self, place: Place, tile: NDArray[Any], leaf_mask: NDArray[np.bool_]) -> Sample:
        """Fill tile (C, H, W), stored type, and leaf mask (H, W).

        Raises: ValueError for a bad sample too many.
        """
        try:
            return Sample(self._reader.read_into(place.shard, place.row, tile, leaf_mask))
        except (ValueError, OSError) as error:
            self._count(place.shard, place.row, error)
            reason = str(error)
        shard, row = place.shard, place.row
        for _ in range(self._reader.manifest.num_samples - 1):
            shard, row = self._following(shard, row)
            try:
                key = self._reader.read_into(shard, row, tile, leaf_mask)
            except (ValueError, OSError) as error:
                self._count(shard, row, error)
            else:
                return Sample(
                    key, BadSample(place.slot, sample_name(self._reader, place.shard, place.row), reason, key)
                )
        raise ValueError(f"no sample of {self._reader.store.location} can be read; restore it or pack it again")

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _count(self, shard: int, row: int, error: Exception) -> None:
        with self._lock:
            self._known_bad.add((shard, row))
            if len(self._known_bad) <= self._max_bad_samples:
                return
        if self._max_bad_samples == 0:
            raise error
        raise ValueError(
            f"more than data.max_bad_samples {self._max_bad_samples} samples cannot be read, the last one: {error}"
        ) from error

    def _following(self, shard: int, row: int) -> tuple[int, int]:
        sizes = self._reader.samples_per_shard
        row += 1
        while row >= sizes[shard]:
            shard, row = (shard + 1) % len(sizes), 0
        return shard, row


def sample_name(reader: ShardReader, shard: int, row: int) -> str:
    """The key of a sample, or its place where the index of its shard cannot be read."""
    try:
        return reader.key(shard, row)
    except (ValueError, OSError):
        return f"sample {row} of {reader.manifest.shards[shard].name}"
