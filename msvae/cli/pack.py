"""`msvae synth` and `msvae pack`: leaf images, and shards of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from msvae.cli import image_options as options
from msvae.cli.image_options import option
from msvae.cli.screen import numbers, progress, say, user_errors, words
from msvae.messages import counted
from msvae.packing.options import PackOptions, PackSummary
from msvae.packing.output import is_merged
from msvae.packing.pack import pack as pack_images
from msvae.synthetic.images import synthesise

app = typer.Typer()


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 24,
    size: Annotated[int, typer.Option(min=64, help="Side of an image in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same images.")] = 0,
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
def pack(
    images: Annotated[
        list[Path], typer.Argument(help="Rasters that GDAL reads, .npy arrays, or folders of them.", metavar="IMAGE…")
    ],
    *,
    band_files: options.BandFiles = "",
    axes: options.Axes = "",
    nodata: options.Nodata = None,
    bands: options.BandNames = "",
    wavelengths: Annotated[
        str,
        option("Bands", "Bands to take, in nm: 475,560,668; or what all bands are, where files do not say."),
    ] = "",
    tolerance_nm: options.ToleranceNm = 20.0,
    scale: options.Scale = None,
    offset: options.Offset = None,
    mask: options.Mask = "auto",
    mask_files: options.MaskFiles = "",
    min_object_px: options.MinObjectPx = 0,
    erode_px: options.ErodePx = 0,
    tile: Annotated[int, option("Tiles", "Side of a tile in pixels, a multiple of 8.")] = 256,
    tiling: Annotated[
        str, option("Tiles", "grid, or leaf: as few tiles as cover 99 % of the leaf.", metavar="grid|leaf")
    ] = "grid",
    stride: Annotated[int | None, option("Tiles", "Pixels from tile to tile; less than --tile overlaps.")] = None,
    min_coverage: Annotated[float, option("Tiles", "Least share of leaf pixels in a tile.")] = 0.1,
    split: Annotated[tuple[float, float, float], option("Split", "Shares of tiles for train, val and test.")] = (
        0.7,
        0.15,
        0.15,
    ),
    split_by: Annotated[
        str, option("Split", "image, block of neighbouring tiles, or auto.", metavar="auto|image|block")
    ] = "auto",
    group_by: Annotated[
        str | None,
        option("Split", "Images in whose path this finds the same stay together: 'plant_([0-9]+)'.", metavar="REGEX"),
    ] = None,
    gap_px: Annotated[
        int, option("Split", "Pixels between tiles of different splits in one image; drops what is nearer.")
    ] = 0,
    seed: Annotated[int, option("Split", "Decides which images or blocks go where.", min=0)] = 0,
    out: Annotated[Path, option("Output", "Folder for train/, val/ and test/.")],
    compress: Annotated[bool, option("Output", "Store tiles compressed, without loss.", "--compress")] = False,
    workers: Annotated[
        int | None, option("Output", "Processes; one a CPU core if not given, fewer for little work.", min=1)
    ] = None,
    part: Annotated[
        str | None, option("Output", "Make this part of the shards: 1/8 to 8/8 in a job array.", metavar="I/N")
    ] = None,
    merge: Annotated[bool, option("Output", "Complete the data set after all parts.", "--merge")] = False,
    overwrite: Annotated[bool, option("Output", "Replace an earlier data set.", "--overwrite")] = False,
) -> None:
    """Cut images into tiles with leaf masks and write them as shards for training.

    What was killed goes on when the same command is given again.
    """
    with user_errors("stopped; `msvae pack` goes on where it was when the same command is given again"):
        asked = PackOptions(
            band_files=words(band_files),
            axes=axes.strip().lower() or None,
            nodata=nodata,
            bands=words(bands),
            wavelengths_nm=numbers("--wavelengths", wavelengths),
            tolerance_nm=tolerance_nm,
            scale=scale,
            offset=offset,
            mask=mask,
            mask_files=mask_files or None,
            min_object_px=min_object_px,
            erode_px=erode_px,
            tile_px=tile,
            tiling=tiling,  # type: ignore[arg-type]  # checked by PackOptions
            stride_px=stride,
            min_coverage=min_coverage,
            split=split,
            split_by=split_by,  # type: ignore[arg-type]  # checked by PackOptions
            group_by=group_by,
            gap_px=gap_px,
            seed=seed,
            compression="delta-blosc2" if compress else "none",
            num_workers=workers,
            part=_part(part),
            merge=merge,
            overwrite=overwrite,
        )
        if part and not overwrite and is_merged(out, asked):
            raise ValueError(
                f"{out} is a finished data set: if it is the one of these parts, part {part} has nothing left to do; "
                "for another name another --out, or give --overwrite"
            )
        with progress("tiles") as advance_to:
            summary = pack_images(images, out, asked, advance_to)
    if summary.shards_missing or part:
        _show_part(summary, out, overwrite)
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
    overlaps = f"; in tiles that overlap, {counted(repeated, 'leaf pixel')} came again" if repeated else ""
    say(f"tiles cover {covered:.1%} of {counted(summary.leaf_pixels_in_images, 'leaf pixel')}{before_gap}{overlaps}")
    if summary.dropped:
        console.print(_dropped(summary))
    for notice in summary.notices:
        say(f"note: {notice}")


def _dropped(summary: PackSummary) -> Table:
    table = Table()
    table.add_column("dropped", justify="right")
    table.add_column("because")
    for reason, count in summary.dropped.items():
        table.add_row(f"{count:,}", reason)
    return table


def _show_part(summary: PackSummary, out: Path, overwrite: bool) -> None:
    num_shards = sum(summary.num_shards.values())
    done = f"{num_shards - summary.shards_missing} of {counted(num_shards, 'shard')} "
    becomes, option = ("is replaced", "--merge --overwrite") if overwrite else ("appears", "--merge")
    when = "when all parts are made, " if summary.shards_missing else ""
    say(f"{done}{'is' if num_shards == 1 else 'are'} made; {out} {becomes} {when}with {option} instead of --part")


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"--part is {text!r}, expected two numbers such as 1/8")
    return int(match[1]), int(match[2])
