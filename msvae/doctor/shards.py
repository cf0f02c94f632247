"""The shards as each rank sees them: real samples, each with its checksum, and how fast they come."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from msvae.config import Config
from msvae.doctor.patience import Found
from msvae.doctor.row import Facts, Row, duration, extent, listed, size, told_of
from msvae.doctor.scene import Scene
from msvae.messages import counted
from msvae.shards.order import permutation
from msvae.shards.reader import ShardReader
from msvae.shards.stores.remote import Patience

MOST_SHARDS = 64
"""That a rank looks into. Ranks choose different ones, so that together they see more."""
READING_S = 2.0
SLOW_SHARE = 0.5
"""Of the median rank's speed."""
IMPATIENT = Patience(attempts=2, timeout_s=10.0)


def look(scene: Scene, location: str) -> Found:
    """Open a split, look into some of its shards, then read samples of these for two seconds.

    Returns: also `bad`, what is wrong with the first that cannot be read, and how many of them there are.
    """
    began_s = time.monotonic()
    reader = ShardReader(location, patience=IMPATIENT)
    opened_s = time.monotonic() - began_s
    sizes = reader.samples_per_shard
    filled = [shard for shard in permutation(len(sizes), scene.rank).tolist() if sizes[shard]]
    chosen = filled[:MOST_SHARDS]
    threads = max(1, 0 if scene.config is None else scene.config.data.num_workers, reader.store.parallel_reads)
    with ThreadPoolExecutor(threads) as pool:
        faults = [fault for fault in pool.map(lambda shard: _fault_of(reader, shard), chosen) if fault]
        bad = {"bad": f"{faults[0]} ({len(faults)} of {counted(len(chosen), 'shard')} looked into)"} if faults else {}
        speed = {} if faults else _speed(reader, pool, chosen, scene.rank, threads)
    return {
        "digest": reader.manifest.digest(),
        "opened_s": opened_s,
        "num_shards": len(sizes),
        "looked_into": len(chosen),
        "num_samples": reader.manifest.num_samples,
        **speed,
        **bad,
    }


def judge(split: str, facts: Facts, config: Config, world_size: int) -> list[Row]:
    """Whether they can be read everywhere, whether they are the same, and how fast they come."""
    name = f"shards: {split}"
    wrong = {
        rank: found.get("fault") or found["bad"] for rank, found in enumerate(facts) if found.keys() & {"fault", "bad"}
    }
    if wrong:
        text = told_of(list(wrong), facts, next(iter(wrong.values())))
        return [Row(name, "fault", text, "`msvae verify` names every fault; every machine must see the same shards")]
    first = facts[0]
    differing = [rank for rank, found in enumerate(facts) if found["digest"] != first["digest"]]
    if differing:
        text = f"another manifest on {listed(differing)} than on rank 0"
        return [Row(name, "fault", text, "copy the same shards to all machines")]
    return [_speed_row(name, facts, config, world_size)]


def judge_batch(config: Config, world_size: int) -> list[Row]:
    """Whether the global batch can be dealt to the ranks that joined."""
    try:
        steps = config.accumulation_steps(world_size)
    except ValueError as error:
        return [Row("batch", "fault", str(error))]
    data = config.data
    micro = counted(steps, "micro batch", "micro batches")
    text = f"{data.global_batch_size:,} tiles a step: {micro} of {data.micro_batch_size:,} on each of {world_size:,}"
    return [Row("batch", "ok", text)]


def _speed_row(name: str, facts: Facts, config: Config, world_size: int) -> Row:
    speeds = [found["bytes_a_s"] for found in facts]
    samples = [found["samples_a_s"] for found in facts]
    text = (
        f"{counted(facts[0]['num_samples'], 'tile')} in {counted(facts[0]['num_shards'], 'shard')}, "
        f"{facts[0]['looked_into']:,} looked into by each rank; "
        f"opened in {extent([found['opened_s'] for found in facts], duration)}, read with "
        f"{extent(speeds, lambda value: f'{size(value)}/s')}"
    )
    if name.endswith("train"):
        a_step = config.data.global_batch_size / world_size
        text += f": the {a_step:,.3g} tiles of a rank's step in {extent([a_step / s for s in samples], duration)}"
    slow = [rank for rank, speed in enumerate(speeds) if speed < SLOW_SHARE * statistics.median(speeds)]
    if slow:
        return Row(name, "warning", f"{text}; slow on {listed(slow)}", "look at the disk or network of that machine")
    return Row(name, "ok", text)


def _fault_of(reader: ShardReader, shard: int) -> str:
    """Of the first and the last sample of a shard; empty when both are sound."""
    try:
        for row in {0, reader.samples_per_shard[shard] - 1}:
            reader.read_into(shard, row, *_arrays(reader))
    except ValueError as error:
        return str(error)
    return ""


def _speed(
    reader: ShardReader, pool: ThreadPoolExecutor, shards: list[int], rank: int, threads: int
) -> dict[str, Any]:
    """Samples in no order, until the time is over."""
    began_s = time.monotonic()
    ends_at_s = began_s + READING_S
    random = np.random.default_rng(rank)
    entries = reader.manifest.shards
    sizes = np.array([entries.num_samples[shard] for shard in shards])

    def read(seed: int) -> tuple[int, float]:
        tile, leaf_mask = _arrays(reader)
        own, samples, num_bytes = np.random.default_rng(seed), 0, 0.0
        while time.monotonic() < ends_at_s or not samples:
            at = int(own.choice(len(shards), p=sizes / sizes.sum()))
            reader.read_into(shards[at], int(own.integers(sizes[at])), tile, leaf_mask)
            samples += 1
            num_bytes += entries.size_bytes[shards[at]] / sizes[at]
        return samples, num_bytes

    counts = _totals(pool.map(read, random.integers(2**32, size=threads).tolist()))
    took_s = time.monotonic() - began_s
    return {"samples_a_s": counts[0] / took_s, "bytes_a_s": counts[1] / took_s}


def _totals(counts: Iterable[tuple[int, float]]) -> tuple[float, float]:
    samples, num_bytes = zip(*counts, strict=True)
    return float(sum(samples)), float(sum(num_bytes))


def _arrays(reader: ShardReader) -> tuple[Any, Any]:
    return np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], np.bool_)
