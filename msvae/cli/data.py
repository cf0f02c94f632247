"""`msvae index`, `verify`, `inspect` and `simulate`: commands for finished shards, in a folder or at a URL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from msvae.cli.screen import numbers, progress, say, user_errors
from msvae.messages import counted
from msvae.packing.pack import save_contact_sheet
from msvae.shards.audit.indexing import IndexedSplit, IndexOptions, index_dataset
from msvae.shards.audit.verify import verify_dataset
from msvae.shards.audit.verify_shard import Fault
from msvae.shards.manifest import Manifest
from msvae.shards.reader import ShardReader
from msvae.shards.reflectance import brightness_notice
from msvae.shards.schedule import Cluster, Schedule
from msvae.shards.schedule import simulate as plan
from msvae.shards.splits import Coverage, find_splits, measure_coverage

app = typer.Typer()

BAR_CHARS = 40
SHOWN_PERCENTILES = ("5", "50", "95")

Location = Annotated[
    str,
    typer.Argument(
        help="Folder or URL of one split, or of a dataset with train/, val/ and test/.", metavar="DIR_OR_URL"
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Number of shards to read at the same time.")]


@app.command()
def index(
    location: Location,
    wavelengths: Annotated[
        str, typer.Option(help="Wavelength of every band in nm, in stored order: 475,560,668,717,840.")
    ] = "",
    bands: Annotated[str, typer.Option(help="Band names, in stored order: blue,green,red,red_edge,nir.")] = "",
    scale: Annotated[
        str, typer.Option(help="Reflectance = value x scale + offset: one number such as 0.0001, or one per band.")
    ] = "",
    offset: Annotated[
        str, typer.Option(help="Reflectance of the stored value 0: one number such as 0, or one per band.")
    ] = "",
    bands_member: Annotated[
        str, typer.Option(help="Member name of tiles, such as bands.npy. Default: the only .npy member.")
    ] = "",
    mask_member: Annotated[
        str, typer.Option(help="Member name of leaf masks, such as mask.png. Default: the only .png member.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the manifest and indexes. Default: the folder of the tars. Needed for a URL."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing manifest.")] = False,
    threads: Threads = 4,
) -> None:
    """Write manifest and indexes for WebDataset tars that another program wrote."""
    with user_errors():
        options = IndexOptions(
            bands_member=bands_member.lower(),
            mask_member=mask_member.lower(),
            wavelengths_nm=numbers("--wavelengths", wavelengths),
            band_names=tuple(name.strip() for name in bands.split(",")) if bands else None,
            scale=numbers("--scale", scale),
            offset=numbers("--offset", offset),
            overwrite=overwrite,
            num_threads=threads,
        )
        with progress("reading", is_bytes=True) as advance_to:
            splits = index_dataset(location, out, options, advance_to)
    _show_indexed(splits)


@app.command()
def verify(location: Location, threads: Threads = 4) -> None:
    """Read every byte of a dataset and compare checksums. Exit code 1 if there is a fault; every fault is printed."""
    with user_errors(), progress("verifying", is_bytes=True) as advance_to:

        def print_fault(fault: Fault) -> None:
            say(f"{fault.file}: {fault.message}")

        found = verify_dataset(location, num_threads=threads, on_fault=print_fault, on_progress=advance_to)
    if found.faults:
        files = len({fault.file for fault in found.faults})
        say(f"{counted(len(found.faults), 'fault')} in {counted(files, 'file')}")
        raise typer.Exit(1)
    for split, read in found.splits.items():
        say(
            f"{split}: sound; {counted(read.num_shards, 'shard')}, {counted(read.num_samples, 'tile')}, "
            f"{read.num_bytes / 1e6:,.1f} MB, {counted(read.leaf.leaf_pixels, 'leaf pixel')}"
        )
        if read.nonfinite_background:
            say(f"note: NaN or infinite: {counted(read.nonfinite_background, 'background pixel')} of {split}")


@app.command()
def inspect(
    location: Location,
    png: Annotated[Path | None, typer.Option(help="File for a contact sheet with some tiles of each split.")] = None,
) -> None:
    """Show the splits, bands and leaf coverage of a dataset, and optionally some tiles."""
    console = Console(highlight=False)
    with user_errors():
        stores = find_splits(location)
        manifests = {name: Manifest.load(store) for name, store in stores.items()}
        coverages = {name: measure_coverage(stores[name], manifest) for name, manifest in manifests.items()}
        console.print(splits_table(manifests, coverages))
        console.print(bands_table(next(iter(manifests.values()))))
        for name, coverage in coverages.items():
            console.print(coverage_chart(name, coverage, manifests[name].num_samples))
        if png is not None:
            save_contact_sheet(png, {name: ShardReader(store.location) for name, store in stores.items()})
            say(f"contact sheet: {png}")


@app.command()
def simulate(
    location: Location,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs per machine, one rank each.")],
    global_batch: Annotated[
        int, typer.Option(min=1, help="Tiles per optimizer step over all GPUs (data.global_batch_size).")
    ],
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Tiles per forward pass of a GPU (data.micro_batch_size).")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to simulate, at most one epoch.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run (train.seed).")] = 0,
    bandwidth_gbit: Annotated[
        float, typer.Option(min=0.001, help="Bandwidth between a machine and the shards, in Gbit/s.")
    ] = 10.0,
    cache_gb: Annotated[
        float | None, typer.Option(min=0, help="Cache size per machine in GB; reports whether it is large enough.")
    ] = None,
) -> None:
    """Show how many bytes and requests a cluster would need. Reads only the manifest."""
    with user_errors():
        cluster = Cluster(nodes, gpus, global_batch, micro_batch)
        store = next(iter(find_splits(location).values()))
        manifest = Manifest.load(store)
        schedule = plan(manifest, cluster, seed=seed, num_steps=steps)
        share = min(1.0, schedule.num_steps / schedule.steps_per_epoch)
        say(
            f"{store.location}: {counted(manifest.num_samples, 'tile')} in {counted(len(manifest.shards), 'shard')}; "
            f"{schedule.steps_per_epoch:,.1f} steps per epoch, {schedule.num_steps:,} simulated"
        )
        Console(highlight=False).print(schedule_table(schedule, cluster, bandwidth_gbit))
        for line in schedule_notes(schedule, cluster, share, cache_gb):
            say(line)


def new_table(first: str, *others: str) -> Table:
    """Return a table whose first column is text and whose other columns are numbers."""
    table = Table()
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def splits_table(manifests: Mapping[str, Manifest], coverages: Mapping[str, Coverage]) -> Table:
    """Return a table with one row per split. Leaf pixels are counted, or estimated from a sample of tiles."""
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
    """Return a table with one row per band: statistics of the reflectance of training leaves."""
    statistics = manifest.statistics
    percentiles = {f"p{name}": statistics.percentiles[name] for name in SHOWN_PERCENTILES if statistics.percentiles}
    table = new_table("band", "nm", "mean", "std", "min", *percentiles, "max")
    table.box = SIMPLE  # vertical lines would exceed 80 characters
    table.title = f"reflectance of training leaves; {manifest.dtype} tiles of {manifest.tile_px} px"
    columns = (statistics.mean, statistics.std, statistics.minimum, *percentiles.values(), statistics.maximum)
    for band, (name, nm) in enumerate(zip(manifest.band_names, manifest.wavelengths_nm, strict=True)):
        table.add_row(name, f"{nm:.0f}", *(f"{column[band]:.3f}" for column in columns))
    return table


def coverage_chart(name: str, coverage: Coverage, num_tiles: int) -> Table:
    """Return a bar chart of tiles by leaf coverage, with one bar per tenth from the first to the last filled one."""
    sampled = "" if coverage.num_tiles == num_tiles else f", {counted(coverage.num_tiles, 'tile')} at even intervals"
    table = Table(title=f"coverage, {name}{sampled}", box=None, show_header=False, title_justify="left")
    largest = max(coverage.histogram)
    filled = np.flatnonzero(coverage.histogram)
    for tenth in range(filled[0], filled[-1] + 1):
        count = coverage.histogram[tenth]
        bar = "█" * round(BAR_CHARS * count / largest) or ("▏" if count else "")
        table.add_row(f"{tenth / 10:.1f}–{(tenth + 1) / 10:.1f}", f"{count:>7,}", bar)
    return table


def schedule_table(schedule: Schedule, cluster: Cluster, bandwidth_gbit: float) -> Table:
    """Return a table of the reads of a machine per step and per epoch; epochs are scaled up from these steps."""
    bytes_per_s = bandwidth_gbit * 1e9 / 8
    epoch_scale = max(1.0, schedule.steps_per_epoch / schedule.num_steps)
    whole_seconds = schedule.node_shard_bytes / schedule.num_steps / bytes_per_s
    node_samples = schedule.rank_samples.reshape(cluster.num_nodes, -1).sum(axis=1) / schedule.num_steps
    requests = node_samples + schedule.step_indexes
    table = new_table("", "least", "mean", "most")
    for name, values, form in (
        ("tiles per GPU and step", schedule.rank_samples / schedule.num_steps, ",.2f"),
        ("tiles per node and step", node_samples, ",.2f"),
        ("MB per node and step", schedule.step_bytes / 1e6, ",.2f"),
        ("requests per step, tile by tile", requests, ",.2f"),
        ("requests per step, one per shard", schedule.step_shards, ",.2f"),
        ("seconds per step, tile by tile", schedule.step_bytes / bytes_per_s, ",.4f"),
        ("seconds per step, whole shards", whole_seconds, ",.4f"),
        ("shards per node and epoch", np.minimum(schedule.node_shards * epoch_scale, schedule.num_shards), ",.0f"),
        ("GB per epoch, tile by tile", schedule.step_bytes.sum(axis=0) * epoch_scale / 1e9, ",.3f"),
        ("GB per epoch, whole shards", schedule.node_shard_bytes * epoch_scale / 1e9, ",.3f"),
        ("GB of cache for whole shards", schedule.node_cache_bytes / 1e9, ",.3f"),
    ):
        table.add_row(name, *(format(value, form) for value in (values.min(), values.mean(), values.max())))
    return table


def schedule_notes(schedule: Schedule, cluster: Cluster, share: float, cache_gb: float | None) -> Iterator[str]:
    """Yield explanations of the table, and whether a cache is large enough."""
    if cluster.micro_batch_size:
        accumulated = cluster.global_batch_size // (cluster.world_size * cluster.micro_batch_size)
        batches = counted(accumulated, "micro batch", "micro batches")
        yield f"{batches} of {cluster.micro_batch_size:,} per GPU and step"
    yield (
        "Tile by tile: the loader sends one request per sample, from the start of its tile to the end of its mask, "
        "and one request for the index of a shard when a GPU first reads from it. One per shard: one request would "
        "fetch all samples of a shard that a node needs in a step. Whole shards: each node fetches a shard once and "
        "keeps it until its last tile is used."
    )
    if share < 1:
        yield f"Numbers per epoch are scaled up from {share:.1%} of an epoch."
    needed, whole, by_sample = (
        float(values.max())
        for values in (schedule.node_cache_bytes, schedule.node_shard_bytes, schedule.step_bytes.sum(axis=0))
    )
    if cache_gb is not None:
        fits = "holds" if cache_gb * 1e9 >= needed else "is too small to hold"
        yield (
            f"A cache of {cache_gb:g} GB {fits} what a node needs ({needed / 1e9:.3f} GB) to fetch each shard "
            f"once; this transfers {whole / by_sample:.1f} times the bytes of reading tile by tile."
        )


def _show_indexed(splits: dict[str, IndexedSplit]) -> None:
    table = new_table("split", "shards", "tiles", "leaf pixels", "MB")
    for name, split in splits.items():
        size = sum(entry.size_bytes for entry in split.entries)
        table.add_row(
            name,
            f"{len(split.entries):,}",
            f"{split.num_samples:,}",
            f"{split.leaf.leaf_pixels:,}",
            f"{size / 1e6:,.1f}",
        )
    Console(highlight=False).print(table)
    for name, split in splits.items():
        if split.leaf.empty_tiles:
            say(f"note: empty mask in {counted(split.leaf.empty_tiles, 'tile')} of {name}")
        if split.leaf.nonfinite_pixels:
            say(
                "note: NaN or infinite, and excluded from the statistics: "
                f"{counted(split.leaf.nonfinite_pixels, 'leaf pixel')} of {name}"
            )
    manifest = Manifest.load(next(iter(splits.values())).folder)
    if (bright := brightness_notice(manifest.statistics.mean, manifest.dtype)) is not None:
        say(f"note: {bright}")
