"""The exact stream as a source for a `webdataset.DataPipeline`, for users' own stages."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from msvae.shards.cache import SpanCache
from msvae.shards.order import SampleOrder, training_plans
from msvae.shards.reader import BatchReader, ShardReader


@dataclass
class ExactSamples(IterableDataset[dict[str, str | bytes]]):
    """This rank's samples in training order, as dictionaries of undecoded members like those of webdataset.

    Keys: `__key__`, `__url__`, `bands.npy` (also of compressed shards), `mask.png`, `json`. The worker processes of a
    DataLoader take micro batches in turn; batches of `micro_batch_size` made there come out in order.
    """

    location: str | Path
    """Folder or URL of a split."""
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    position: int = 0
    """Global batches that were seen before."""
    num_positions: int | None = None
    """Global batches to give; None goes on without end."""
    max_bad_samples: int = 0
    """Samples that may be unreadable: each is warned of, and replaced as in training."""
    cache: SpanCache | None = None
    """Keeps what was read from afar."""

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.world_size * self.micro_batch_size):
            raise ValueError(
                f"global_batch_size is {self.global_batch_size}, expected a multiple of {self.world_size} ranks x "
                f"micro_batch_size {self.micro_batch_size}"
            )

    def __iter__(self) -> Iterator[dict[str, str | bytes]]:
        reader = ShardReader(self.location, self.cache)
        batch_reader = BatchReader(reader, self.max_bad_samples)
        plans = training_plans(
            SampleOrder(reader.samples_per_shard, self.seed),
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            position=self.position,
        )
        end = None if self.num_positions is None else self.position + self.num_positions
        worker, num_workers = (info.id, info.num_workers) if (info := get_worker_info()) is not None else (0, 1)
        for number, plan in zip(count(), plans):
            if plan.batch_index == end:
                return
            if number % num_workers == worker:
                for reference in plan.samples:
                    sample, bad = batch_reader.read(reference, reader.members)
                    if bad is not None:
                        warnings.warn(f"{bad.replaced_by} stands for {bad.key}: {bad.reason}", stacklevel=2)
                    yield sample
