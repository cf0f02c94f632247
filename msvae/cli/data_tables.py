"""How `msvae inspect` and its neighbours look: tables and a bar chart for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from msvae.messages import counted
from msvae.shards.manifest import Manifest
from msvae.shards.overview import Coverage
from msvae.shards.schedule import Cluster, Schedule

BAR_CHARS = 40
SHOWN_PERCENTILES = ("5", "50", "95")


def new_table(first: str, *others: str) -> Table:
    """A table of numbers with their names to the left."""
    table = Table()
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def splits_table(manifests: Mapping[str, Manifest], coverages: Mapping[str, Coverage]) -> Table:
    """A row a split. Leaf pixels are counted, or estimated from the tiles that were looked at."""
    table = new_table("split", "shards", "tiles", "leaf pixels", "MB")
    for name, manifest in manifests.items():
        coverage = coverages[name]
        share = manifest.num_samples / coverage.num_tiles
        about = "" if coverage.num_tiles == manifest.num_samples else "about "
        table.add_row(
            name,
            f"{len(manifest.shards):,}",
            f"{manifest.num_samples:,}",
            f"{about}{round(coverage.leaf_pixels * share):,}",
            f"{sum(manifest.shards.size_bytes) / 1e6:,.1f}",
        )
    return table


def bands_table(manifest: Manifest) -> Table:
    """A row a band: reflectance of the training leaf."""
    statistics = manifest.statistics
    percentiles = {f"p{name}": statistics.percentiles[name] for name in SHOWN_PERCENTILES if statistics.percentiles}
    table = new_table("band", "nm", "mean", "std", "min", *percentiles, "max")
    table.box = SIMPLE  # lines would not fit 80 characters
    table.title = f"reflectance of leaf in training; {manifest.dtype} tiles of {manifest.tile_px} px"
    columns = (statistics.mean, statistics.std, statistics.minimum, *percentiles.values(), statistics.maximum)
    for band, (name, nm) in enumerate(zip(manifest.band_names, manifest.wavelengths_nm, strict=True)):
        table.add_row(name, f"{nm:.0f}", *(f"{column[band]:.3f}" for column in columns))
    return table


def coverage_chart(name: str, coverage: Coverage, num_tiles: int) -> Table:
    """Tiles by coverage, a bar for each tenth from the first to the last that has tiles."""
    looked_at = "" if coverage.num_tiles == num_tiles else f", of {counted(coverage.num_tiles, 'tile')} in even steps"
    table = Table(title=f"coverage, {name}{looked_at}", box=None, show_header=False, title_justify="left")
    largest = max(coverage.histogram)
    filled = np.flatnonzero(coverage.histogram)
    for tenth in range(filled[0], filled[-1] + 1):
        count = coverage.histogram[tenth]
        bar = "█" * round(BAR_CHARS * count / largest) or ("▏" if count else "")
        table.add_row(f"{tenth / 10:.1f}–{(tenth + 1) / 10:.1f}", f"{count:>7,}", bar)
    return table


def schedule_table(schedule: Schedule, cluster: Cluster, bandwidth_gbit: float) -> Table:
    """What a node reads in a step, and in an epoch of which these steps are a part."""
    bytes_a_second = bandwidth_gbit * 1e9 / 8
    in_an_epoch = max(1.0, schedule.steps_an_epoch / schedule.num_steps)
    whole_seconds = schedule.node_shard_bytes / schedule.num_steps / bytes_a_second
    node_samples = schedule.rank_samples.reshape(cluster.num_nodes, -1).sum(axis=1) / schedule.num_steps
    requests = node_samples + schedule.step_indexes
    table = new_table("", "least", "mean", "most")
    for name, values, form in (
        ("tiles of a GPU a step", schedule.rank_samples / schedule.num_steps, ",.2f"),
        ("tiles of a node a step", node_samples, ",.2f"),
        ("MB of a node a step", schedule.step_bytes / 1e6, ",.2f"),
        ("requests a step, tile by tile", requests, ",.2f"),
        ("requests a step, one a shard", schedule.step_shards, ",.2f"),
        ("seconds a step, tile by tile", schedule.step_bytes / bytes_a_second, ",.4f"),
        ("seconds a step, whole shards", whole_seconds, ",.4f"),
        ("shards of a node an epoch", np.minimum(schedule.node_shards * in_an_epoch, schedule.num_shards), ",.0f"),
        ("GB an epoch, tile by tile", schedule.step_bytes.sum(axis=0) * in_an_epoch / 1e9, ",.3f"),
        ("GB an epoch, whole shards", schedule.node_shard_bytes * in_an_epoch / 1e9, ",.3f"),
        ("GB of cache for whole shards", schedule.node_cache_bytes / 1e9, ",.3f"),
    ):
        table.add_row(name, *(format(value, form) for value in (values.min(), values.mean(), values.max())))
    return table


def schedule_notes(schedule: Schedule, cluster: Cluster, share: float, cache_gb: float | None) -> Iterator[str]:
    """How the table is meant, and whether a cache is large enough."""
    if cluster.micro_batch_size:
        accumulated = cluster.global_batch_size // (cluster.world_size * cluster.micro_batch_size)
        batches = counted(accumulated, "micro batch", "micro batches")
        yield f"{batches} of {cluster.micro_batch_size:,} a GPU and step"
    yield (
        "Tile by tile, as the loader reads, a request takes one sample from the start of its tile to the end of its "
        "mask, and another the index of a shard when a GPU first reads from it. One a shard would take all that a "
        "node's step needs of it. Whole shards are fetched once by each node and kept until their last tile."
    )
    if share < 1:
        yield f"Figures of an epoch are scaled up from {share:.1%} of it."
    needed, whole, by_sample = (
        float(values.max())
        for values in (schedule.node_cache_bytes, schedule.node_shard_bytes, schedule.step_bytes.sum(axis=0))
    )
    if cache_gb is not None:
        verdict = "holds" if cache_gb * 1e9 >= needed else "is too small to hold"
        yield (
            f"A cache of {cache_gb:g} GB {verdict} what a node needs ({needed / 1e9:.3f} GB) to fetch each shard "
            f"once; that moves {whole / by_sample:.1f} times the bytes of reading tile by tile."
        )
