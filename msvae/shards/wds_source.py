"""The training samples in their exact order, as a source for a `webdataset.DataPipeline`."""

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
    """This rank's samples in training order, as dictionaries of undecoded members in the form of webdataset.

    Keys are `__key__`, `__url__`, `bands.npy` (also for compressed shards), `mask.png` and `json`. The worker
    processes of a DataLoader read micro batches in turn, so batches of `micro_batch_size` that they form arrive in
    order.
    """

    location: str | Path
    """Folder or URL of a split."""
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    position: int = 0
    """Index of the first global batch."""
    num_positions: int | None = None
    """Number of global batches; None means no end."""
    max_bad_samples: int = 0
    """Limit of samples that cannot be read. Each one causes a warning and is replaced as in training."""
    cache: SpanCache | None = None
    """Cache for remote shards."""

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
                for sample in plan.samples:
                    members, bad = batch_reader.read(sample, reader.members)
                    if bad is not None:
                        warnings.warn(f"{bad.replaced_by} replaces {bad.key}: {bad.reason}", stacklevel=2)
                    yield members
