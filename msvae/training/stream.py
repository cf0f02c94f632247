"""This rank's share of the training data, one global batch after another, and a record of the samples it read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.runs import JsonLines
from msvae.shards.augment import Augmentation
from msvae.shards.cache import cache_for
from msvae.shards.loader import Batch, Loader
from msvae.shards.order import SampleOrder, training_plans
from msvae.shards.reader import ShardReader


class TrainingStream:
    """Reads `data.train` in the order of the run, and augments the tiles."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._accumulation_steps = config.accumulation_steps(ranks.world_size)
        self.reader = ShardReader(config.data.train, cache_for(config.data))
        self.order = SampleOrder(self.reader.samples_per_shard, config.train.seed)
        self._augmentation = self._make_augmentation()

    def global_batches(self, step: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro batches of step `step + 1`, then of each following step, without end.

        The samples of a step are recorded when its micro batches are yielded.
        """
        trace = self._open_record("trace", step) if self._config.data.trace else None
        bad_samples = self._open_record("bad-samples", step) if self._config.data.max_bad_samples else None
        batches = map(self._augment, self._loader(step))
        while micro_batches := list(islice(batches, self._accumulation_steps)):
            step += 1
            if trace is not None:
                trace.write({"step": step, "keys": [key for batch in micro_batches for key in batch.keys]})
            if bad_samples is not None:
                for bad in (bad for batch in micro_batches for bad in batch.bad):
                    bad_samples.write({"step": step, **bad._asdict()})
            yield micro_batches

    def _loader(self, step: int) -> Loader:
        data = self._config.data
        plans = training_plans(
            self.order,
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            position=step,
        )
        return Loader(
            self.reader,
            plans,
            batch_size=data.micro_batch_size,
            num_workers=data.num_workers,
            device=self._ranks.device,
            max_bad_samples=data.max_bad_samples,
        )

    def _make_augmentation(self) -> Augmentation:
        data, tile_px = self._config.data, self.reader.manifest.tile_px
        if (data.crop_px or 0) > tile_px:
            raise ValueError(
                f"data.crop_px is {data.crop_px}, expected at most {tile_px}, the side of the tiles of {data.train}; "
                "choose a smaller crop"
            )
        return Augmentation(
            self._config.train.seed, flips=data.flips, quarter_turns=data.quarter_turns, crop_px=data.crop_px
        )

    def _augment(self, batch: Batch) -> Batch:
        first = batch.plan.batch_index * self._config.data.global_batch_size + batch.slots[0]
        tiles, leaf_mask = self._augmentation(batch.tiles, batch.leaf_mask, range(first, first + len(batch.tiles)))
        return replace(batch, tiles=tiles, leaf_mask=leaf_mask)

    def _open_record(self, name: str, step: int) -> JsonLines:
        """Open this rank's file, and drop rows of steps after `step`, which a resumed run reads again."""
        folder = self._config.folder / name
        for path in folder.glob("rank-*.jsonl"):
            # an earlier start with more ranks wrote files of ranks that this start does not have
            if self._ranks.is_main and path.name >= _record_name(self._ranks.world_size):
                JsonLines(path, step).close()
        return JsonLines(folder / _record_name(self._ranks.rank), step)


def _record_name(rank: int) -> str:
    return f"rank-{rank:05d}.jsonl"
