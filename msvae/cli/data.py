"""`msvae index`, `verify`, `inspect` and `simulate`: finished shards, on disk or behind a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from msvae.cli.data_tables import bands_table, coverage_chart, new_table, schedule_notes, schedule_table, splits_table
from msvae.cli.screen import numbers, progress, user_errors
from msvae.pack.sheet import save_contact_sheet
from msvae.shards.audit.indexing import IndexedSplit, IndexOptions, index_data_set
from msvae.shards.audit.verify import verify_data_set
from msvae.shards.audit.verify_shard import Fault
from msvae.shards.manifest import Manifest
from msvae.shards.overview import measure_coverage
from msvae.shards.reader import ShardReader
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
    console = Console(highlight=False)
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
    console.print(table)
    for name, split in splits.items():
        if split.leaf.empty_tiles:
            console.print(f"note: {split.leaf.empty_tiles:,} tiles of {name} have an empty mask", soft_wrap=True)
        if split.leaf.nonfinite_pixels:
            console.print(
                f"note: {split.leaf.nonfinite_pixels:,} leaf pixels of {name} are not finite and were left out of the "
                "statistics",
                soft_wrap=True,
            )


@app.command()
def verify(location: Location, threads: Threads = 4) -> None:
    """Read every byte again: name every fault and exit with 1, or say that all is sound."""
    console = Console(highlight=False, markup=False)
    with user_errors(), progress("verifying", is_bytes=True) as advance_to:

        def name(fault: Fault) -> None:
            console.print(f"{fault.file}: {fault.message}", soft_wrap=True)

        found = verify_data_set(location, num_threads=threads, on_fault=name, on_progress=advance_to)
    if found.faults:
        files = len({fault.file for fault in found.faults})
        console.print(f"{len(found.faults):,} faults in {files:,} files", soft_wrap=True)
        raise typer.Exit(1)
    for split, read in found.splits.items():
        console.print(
            f"{split}: sound; {read.num_shards:,} shards, {read.num_samples:,} tiles, {read.num_bytes / 1e6:,.1f} MB, "
            f"{read.leaf.leaf_pixels:,} leaf pixels",
            soft_wrap=True,
        )
        if read.nonfinite_background:
            console.print(f"note: {read.nonfinite_background:,} background pixels of {split} are not finite")


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
            console.print(f"contact sheet: {png}", soft_wrap=True)


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
    console = Console(highlight=False)
    with user_errors():
        cluster = Cluster(nodes, gpus, global_batch, micro_batch)
        store = next(iter(find_splits(location).values()))
        manifest = Manifest.load(store)
        schedule = plan(manifest, cluster, seed=seed, num_steps=steps)
        share = min(1.0, schedule.num_steps / schedule.steps_an_epoch)
        console.print(
            f"{store.location}: {manifest.num_samples:,} tiles in {len(manifest.shards):,} shards; "
            f"{schedule.steps_an_epoch:,.1f} steps an epoch, {schedule.num_steps:,} followed",
            soft_wrap=True,
        )
        console.print(schedule_table(schedule, cluster, bandwidth_gbit))
        for line in schedule_notes(schedule, cluster, share, cache_gb):
            console.print(line, soft_wrap=True)
