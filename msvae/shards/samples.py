"""Reading the samples of a micro batch: several at once where that pays, and another one for each that is bad."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from msvae.shards.order import MicroBatchPlan, SampleRef
from msvae.shards.reader import ShardReader
from msvae.shards.stores.store import FileError

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
        self._reasons: dict[tuple[int, int], str] = {}
        """Why samples are bad, by shard and row; all those of a shard that is no use as a whole."""
        self._lock = threading.Lock()
        parallel = reader.store.parallel_reads
        self._pool = ThreadPoolExecutor(parallel, "msvae-request") if parallel > 1 else None

    def each(self, read: Callable[[int, SampleRef], T], plan: MicroBatchPlan) -> list[T]:
        """`read(i, place)` of every sample of a plan."""
        along = map if self._pool is None else self._pool.map
        return list(along(read, range(len(plan.samples)), plan.samples))

    def read_into(self, place: SampleRef, tile: NDArray[Any], leaf_mask: NDArray[np.bool_]) -> Sample:
        """Fill tile (C, H, W), stored type, and leaf mask (H, W).

        Raises: ValueError for a bad sample too many.
        """
        return Sample(*self.read(place, lambda shard, row: self._reader.read_into(shard, row, tile, leaf_mask)))

    def read(self, place: SampleRef, read: Callable[[int, int], T]) -> tuple[T, BadSample | None]:
        """`read(shard, row)` of the sample at a place, or of the one that replaces it.

        Raises: ValueError for a bad sample too many.
        """
        shard, row = place.shard, place.row
        if (found := self._try(shard, row, read)) is not None:
            return found, None
        for _ in range(self._reader.manifest.num_samples - 1):
            shard, row = self._following(shard, row)
            if (found := self._try(shard, row, read)) is not None:
                name, reason = sample_name(self._reader, place.shard, place.row), self._reasons[place[:2]]
                return found, BadSample(place.slot, name, reason, self._reader.key(shard, row))
        raise ValueError(f"no sample of {self._reader.store.location} can be read; restore it or pack it again")

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _try(self, shard: int, row: int, read: Callable[[int, int], T]) -> T | None:
        """What `read` gives, or None for a sample that is bad; one that is known to be is not asked for again."""
        with self._lock:
            if (shard, row) in self._reasons:
                return None
        try:
            return read(shard, row)
        except (ValueError, OSError) as error:
            rows = range(self._reader.samples_per_shard[shard]) if isinstance(error, FileError) else (row,)
            with self._lock:
                self._reasons |= {(shard, bad): str(error) for bad in rows if (shard, bad) not in self._reasons}
                num_bad = len(self._reasons)
            if num_bad <= self._max_bad_samples:
                return None
            if self._max_bad_samples == 0:
                raise
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
