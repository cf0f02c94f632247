"""`msvae index`, `verify`, `inspect` and `simulate`: finished shards, on disk or behind a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from msvae.cli.data_tables import bands_table, coverage_chart, new_table, schedule_notes, schedule_table, splits_table
from msvae.cli.screen import numbers, progress, say, user_errors
from msvae.messages import counted
from msvae.packing.sheet import save_contact_sheet
from msvae.shards.audit.indexing import IndexedSplit, IndexOptions, index_data_set
from msvae.shards.audit.verify import verify_data_set
from msvae.shards.audit.verify_shard import Fault
from msvae.shards.manifest import Manifest
from msvae.shards.overview import measure_coverage
from msvae.shards.reader import ShardReader
from msvae.shards.reflectance import brightness_notice
from msvae.shards.schedule import Cluster
from msvae.shards.schedule import simulate as plan
from msvae.shards.splits import find_splits

app = typer.Typer()

Location = Annotated[
    str, typer.Argument(help="Folder or URL of one split, or of train/, val/ and test/.", metavar="DIR_OR_URL")
]
Threads = Annotated[int, typer.Option(min=1, help="Shards read at the same time.")]


@app.command()
def index(
    location: Location,
    wavelengths: Annotated[str, typer.Option(help="Of every band in nm, in stored order: 475,560,668,717,840.")] = "",
    bands: Annotated[str, typer.Option(help="Names of the bands: blue,green,red,red_edge,nir.")] = "",
    scale: Annotated[str, typer.Option(help="Reflectance of the stored value 1: 0.0001, or one a band.")] = "",
    offset: Annotated[str, typer.Option(help="Reflectance of the stored value 0: 0, or one a band.")] = "",
    bands_member: Annotated[str, typer.Option(help="Ending of tiles, such as bands.npy; else the only .npy.")] = "",
    mask_member: Annotated[str, typer.Option(help="Ending of leaf masks, such as mask.png; else the only .png.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder to write to instead, such as for a URL.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a manifest that is there.")] = False,
    threads: Threads = 4,
) -> None:
    """Make manifest and indexes for WebDataset tars that others wrote."""
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
            splits = index_data_set(location, out, options, advance_to)
    _show_indexed(splits)


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
                "note: not finite and left out of the statistics: "
                f"{counted(split.leaf.nonfinite_pixels, 'leaf pixel')} of {name}"
            )
    manifest = Manifest.load(next(iter(splits.values())).folder)
    if (bright := brightness_notice(manifest.statistics.mean, manifest.dtype)) is not None:
        say(f"note: {bright}")


@app.command()
def verify(location: Location, threads: Threads = 4) -> None:
    """Read every byte again: name every fault and exit with 1, or say that all is sound."""
    with user_errors(), progress("verifying", is_bytes=True) as advance_to:

        def name(fault: Fault) -> None:
            say(f"{fault.file}: {fault.message}")

        found = verify_data_set(location, num_threads=threads, on_fault=name, on_progress=advance_to)
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
            say(f"note: not finite: {counted(read.nonfinite_background, 'background pixel')} of {split}")


@app.command()
def inspect(
    location: Location,
    png: Annotated[Path | None, typer.Option(help="Write a contact sheet of some tiles of each split.")] = None,
) -> None:
    """Show what is in a data set: splits, bands, coverage, and some tiles."""
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
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a machine, one rank each.")],
    global_batch: Annotated[int, typer.Option(min=1, help="Tiles of an optimizer step over all GPUs.")],
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Tiles that a GPU takes at once.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to follow, at most an epoch.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="train.seed of the run.")] = 0,
    bandwidth_gbit: Annotated[float, typer.Option(min=0.001, help="Bandwidth of a machine to the shards.")] = 10.0,
    cache_gb: Annotated[float | None, typer.Option(min=0, help="Cache of a machine, to be judged.")] = None,
) -> None:
    """Show what a cluster would read, from the manifest alone."""
    with user_errors():
        cluster = Cluster(nodes, gpus, global_batch, micro_batch)
        store = next(iter(find_splits(location).values()))
        manifest = Manifest.load(store)
        schedule = plan(manifest, cluster, seed=seed, num_steps=steps)
        share = min(1.0, schedule.num_steps / schedule.steps_an_epoch)
        say(
            f"{store.location}: {counted(manifest.num_samples, 'tile')} in {counted(len(manifest.shards), 'shard')}; "
            f"{schedule.steps_an_epoch:,.1f} steps an epoch, {schedule.num_steps:,} followed"
        )
        Console(highlight=False).print(schedule_table(schedule, cluster, bandwidth_gbit))
        for line in schedule_notes(schedule, cluster, share, cache_gb):
            say(line)
