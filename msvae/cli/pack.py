"""The commands `msvae synth`, which makes leaf images, and `msvae pack`, which makes shards of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from msvae.cli.options import option, with_options
from msvae.cli.screen import progress, say, user_errors
from msvae.messages import counted
from msvae.packing.options import PackOptions
from msvae.packing.pack import is_merged
from msvae.packing.pack import pack as pack_images
from msvae.packing.summary import PackSummary
from msvae.synthetic.images import synthesise

app = typer.Typer()


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 24,
    size: Annotated[int, typer.Option(min=64, help="Side of an image in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Random seed: the same seed gives the same images.")] = 0,
) -> None:
    """Make leaf images with the spectra of the PROSPECT-D model, and their masks."""
    with user_errors(), progress("leaves") as advance_to:
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            advance_to(done, images)

        synthesise(out, num_images=images, size_px=size, seed=seed, on_image=count)
    say(f"{counted(images, 'leaf image')} and {'its mask' if images == 1 else 'their masks'} are in {out}")


@app.command()
@with_options(PackOptions)
def pack(
    images: Annotated[
        list[Path], typer.Argument(help="Rasters that GDAL reads, .npy arrays, or folders of them.", metavar="IMAGE…")
    ],
    *,
    out: Annotated[Path, option("Output", "Folder for train/, val/ and test/.")],
    options: PackOptions,
) -> None:
    """Cut images into tiles with leaf masks and write them as shards for training.

    The same command resumes a killed run.
    """
    with user_errors("stopped; the same `msvae pack` command resumes"):
        if options.part is not None and not options.overwrite and is_merged(out, options):
            number, num_parts = options.part
            raise ValueError(
                f"{out} is a finished dataset: if it was made of these parts, part {number}/{num_parts} has nothing "
                "left to do; for another dataset name another --out, or give --overwrite"
            )
        with progress("tiles") as advance_to:
            summary = pack_images(images, out, options, advance_to)
    if summary.shards_missing or options.part is not None:
        _show_part(summary, out, options.overwrite)
    else:
        _show(summary)


def _show(summary: PackSummary) -> None:
    console = Console(highlight=False)
    say(f"{summary.out}: {counted(summary.num_images, 'image')}, {summary.num_bytes / 1e6:.1f} MB")
    table = Table()
    for heading in ("split", "tiles", "shards", "leaf pixels"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, num_tiles in summary.tiles.items():
        table.add_row(name, str(num_tiles), str(summary.num_shards[name]), f"{summary.leaf_pixels[name]:,}")
    console.print(table)
    covered = summary.leaf_pixels_covered / max(summary.leaf_pixels_in_images, 1)
    say(
        f"{summary.bands}, {summary.dtype}, tiles of {summary.tile_px} px, mean coverage {summary.coverage_mean:.2f}, "
        f"split by {summary.split_by}"
    )
    before_gap = " before the gap" if summary.num_in_gap else ""
    repeated = summary.leaf_pixels_repeated
    overlaps = f"; overlapping tiles repeat {counted(repeated, 'leaf pixel')}" if repeated else ""
    say(f"tiles cover {covered:.1%} of {counted(summary.leaf_pixels_in_images, 'leaf pixel')}{before_gap}{overlaps}")
    if summary.dropped:
        console.print(_dropped(summary))
    for notice in summary.notices:
        say(f"note: {notice}")


def _dropped(summary: PackSummary) -> Table:
    table = Table()
    table.add_column("dropped", justify="right")
    table.add_column("reason")
    for reason, count in summary.dropped.items():
        table.add_row(f"{count:,}", reason)
    return table


def _show_part(summary: PackSummary, out: Path, overwrite: bool) -> None:
    num_shards = sum(summary.num_shards.values())
    done = f"{num_shards - summary.shards_missing} of {counted(num_shards, 'shard')} "
    write, option = ("replace", "--merge --overwrite") if overwrite else ("write", "--merge")
    when = "when all parts are made, " if summary.shards_missing else ""
    say(
        f"{done}{'is' if num_shards == 1 else 'are'} made; {when}run this command with {option} instead of --part to "
        f"{write} {out}"
    )
