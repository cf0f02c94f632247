"""Checks of the inputs of a run on every rank: the shards, the global batch, and the weights of the model."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from msvae.config import Config
from msvae.doctor.row import Context, Facts, OwnFacts, Row, duration, failed, list_ranks, on_ranks, size, value_range
from msvae.messages import counted
from msvae.model.build import build_model
from msvae.shards.manifest import Manifest
from msvae.shards.order import permutation
from msvae.shards.reader import ShardReader
from msvae.shards.stores.remote import RetryPolicy

MAX_SHARDS = 64
"""Number of shards that a rank reads from. Ranks choose different shards, so that together they check more."""
READING_S = 2.0
"""Duration of the speed test, in seconds."""
SLOW_SHARE = 0.5
"""A rank is slow if it reads at less than this share of the median speed."""
FEW_RETRIES = RetryPolicy(attempts=2, timeout_s=10.0)
FLOAT_BYTES = 4


def collect_shards(context: Context, location: str) -> OwnFacts:
    """Open a split, verify samples of some of its shards, then read random samples for two seconds.

    Returns: facts of the split. If a shard cannot be read, `bad` holds its error and the number of such shards.
    """
    began_s = time.monotonic()
    reader = ShardReader(location, retry=FEW_RETRIES)
    opened_s = time.monotonic() - began_s
    sizes = reader.samples_per_shard
    filled = [shard for shard in permutation(len(sizes), context.rank).tolist() if sizes[shard]]
    chosen = filled[:MAX_SHARDS]
    num_workers = 0 if context.config is None else context.config.data.num_workers
    threads = max(1, num_workers, reader.store.parallel_reads)
    with ThreadPoolExecutor(threads) as pool:
        faults = [fault for fault in pool.map(lambda shard: _shard_fault(reader, shard), chosen) if fault]
        bad = {"bad": f"{faults[0]} ({len(faults)} of {counted(len(chosen), 'checked shard')})"} if faults else {}
        speed = {} if faults else _read_speed(reader, pool, chosen, context.rank, threads)
    return {
        "digest": reader.manifest.digest(),
        "opened_s": opened_s,
        "num_shards": len(sizes),
        "num_checked": len(chosen),
        "num_samples": reader.manifest.num_samples,
        **speed,
        **bad,
    }


def check_shards(split: str, facts: Facts, config: Config, world_size: int) -> list[Row]:
    """Check that all ranks can read the split, that all see the same manifest, and how fast they read."""
    name = f"shards: {split}"
    faults = {rank: own.get("fault") or own["bad"] for rank, own in enumerate(facts) if own.keys() & {"fault", "bad"}}
    if faults:
        text = on_ranks(list(faults), facts, next(iter(faults.values())))
        advice = "run `msvae verify` to list every fault, and make the same shards available on every machine"
        return [Row(name, "fault", text, advice)]
    first = facts[0]
    differing = [rank for rank, own in enumerate(facts) if own["digest"] != first["digest"]]
    if differing:
        text = f"the manifest on {list_ranks(differing)} differs from the manifest on rank 0"
        return [Row(name, "fault", text, "copy the same shards to all machines")]
    return [_check_speed(name, facts, config, world_size)]


def check_batch(config: Config, world_size: int) -> list[Row]:
    """Check that the global batch divides evenly among the ranks that joined."""
    try:
        steps = config.accumulation_steps(world_size)
    except ValueError as error:
        return [Row("batch", "fault", str(error))]
    data = config.data
    micro = counted(steps, "micro batch", "micro batches")
    text = (
        f"{data.global_batch_size:,} tiles per step: {micro} of {data.micro_batch_size:,} on each of "
        f"{counted(world_size, 'rank')}"
    )
    return [Row("batch", "ok", text)]


def collect_model(context: Context) -> OwnFacts:
    """Build the model as training does, and count its parameters. Only local rank 0 of each machine does so."""
    if context.config is None or context.local_rank:
        return {}
    config = context.config
    try:
        manifest = Manifest.load(config.data.train)
    except ValueError:
        # the row of the shards reports this error
        return {}
    model = build_model(
        config.model, config.loss, config.data.background, manifest.bands, manifest.statistics, config.train.seed
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"all": sum(parameter.numel() for parameter in model.parameters()), "trained": trained}


def check_model(facts: Facts) -> list[Row]:
    """Return one row with the number of parameters, or no row without a configuration."""
    advice = "set model.pretrained to a folder that exists on every machine, or run `hf auth login` on each"
    if (row := failed("model", facts, advice)) is not None:
        return [row]
    if (counts := parameter_counts(facts)) is None:
        return []
    total, trained = counts
    text = (
        f"{total / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained: a gradient of {size(gradient_bytes(facts))}"
    )
    return [Row("model", "ok", text)]


def parameter_counts(facts: Facts) -> tuple[int, int] | None:
    """Return the numbers of all parameters and of trained parameters, or None if they are unknown."""
    known = next((own for own in facts if "all" in own), None)
    return None if known is None else (known["all"], known["trained"])


def gradient_bytes(facts: Facts) -> int:
    """Return the size of the gradient that each rank sends per step, or 0 if it is unknown."""
    counts = parameter_counts(facts)
    return 0 if counts is None else FLOAT_BYTES * counts[1]


def _check_speed(name: str, facts: Facts, config: Config, world_size: int) -> Row:
    speeds = [own["bytes_per_s"] for own in facts]
    samples = [own["samples_per_s"] for own in facts]
    text = (
        f"{counted(facts[0]['num_samples'], 'tile')} in {counted(facts[0]['num_shards'], 'shard')}, "
        f"{facts[0]['num_checked']:,} checked by each rank; "
        f"opened in {value_range([own['opened_s'] for own in facts], duration)}, read at "
        f"{value_range(speeds, lambda value: f'{size(value)}/s')}"
    )
    if name.endswith("train"):
        tiles = config.data.global_batch_size / world_size
        text += f": the {tiles:,.3g} tiles per rank and step in {value_range([tiles / s for s in samples], duration)}"
    slow = [rank for rank, speed in enumerate(speeds) if speed < SLOW_SHARE * statistics.median(speeds)]
    if slow:
        return Row(name, "warning", f"{text}; slow on {list_ranks(slow)}", "check the disk or network of that machine")
    return Row(name, "ok", text)


def _shard_fault(reader: ShardReader, shard: int) -> str:
    """Read the first and the last sample of a shard. Return the error, or an empty text if both are intact."""
    try:
        for row in {0, reader.samples_per_shard[shard] - 1}:
            reader.read_into(shard, row, *_empty_arrays(reader))
    except ValueError as error:
        return str(error)
    return ""


def _read_speed(
    reader: ShardReader, pool: ThreadPoolExecutor, shards: list[int], rank: int, threads: int
) -> dict[str, float]:
    """Read random samples in all threads for `READING_S` seconds, and return samples and bytes per second."""
    began_s = time.monotonic()
    ends_at_s = began_s + READING_S
    random = np.random.default_rng(rank)
    entries = reader.manifest.shards
    sizes = np.array([entries.num_samples[shard] for shard in shards])

    def read(seed: int) -> tuple[int, float]:
        tile, leaf_mask = _empty_arrays(reader)
        own, samples, num_bytes = np.random.default_rng(seed), 0, 0.0
        while time.monotonic() < ends_at_s or not samples:
            at = int(own.choice(len(shards), p=sizes / sizes.sum()))
            reader.read_into(shards[at], int(own.integers(sizes[at])), tile, leaf_mask)
            samples += 1
            num_bytes += entries.size_bytes[shards[at]] / sizes[at]
        return samples, num_bytes

    samples, num_bytes = zip(*pool.map(read, random.integers(2**32, size=threads).tolist()), strict=True)
    took_s = time.monotonic() - began_s
    return {"samples_per_s": sum(samples) / took_s, "bytes_per_s": sum(num_bytes) / took_s}


def _empty_arrays(reader: ShardReader) -> tuple[Any, Any]:
    return np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], np.bool_)
