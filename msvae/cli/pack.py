"""`msvae synth` and `msvae pack`: leaf images, and shards of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from msvae.cli.screen import progress, user_errors
from msvae.pack.job import pack as pack_images
from msvae.pack.options import PackOptions, PackSummary
from msvae.pack.synthetic.images import synthesise

app = typer.Typer()
TILES_PANEL, SPLIT_PANEL, OUTPUT_PANEL = "Tiles", "Split", "Output"


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
    Console().print(f"{images} leaf images and their masks are in {out}", soft_wrap=True, highlight=False)


@app.command()
def pack(
    images: Annotated[list[Path], typer.Argument(help="Rasters, or folders of rasters.", metavar="IMAGE…")],
    out: Annotated[Path, typer.Option(help="Folder for train/, val/ and test/.", rich_help_panel=OUTPUT_PANEL)],
    band_files: Annotated[
        str, typer.Option(help="One-band files that make up an image, comma-separated; each IMAGE is a folder then.")
    ] = "",
    wavelengths: Annotated[str, typer.Option(help="Bands to take, in nm, comma-separated: 475,560,668,717,840.")] = "",
    scale: Annotated[float | None, typer.Option(help="Reflectance of the stored value 1, such as 0.0001.")] = None,
    mask: Annotated[
        str, typer.Option(help="`auto`: NAME_mask file, else nodata; or an index such as 'ndvi>0.10'.")
    ] = "auto",
    tile: Annotated[
        int, typer.Option(help="Side of a tile in pixels, a multiple of 8.", rich_help_panel=TILES_PANEL)
    ] = 256,
    tiling: Annotated[
        str,
        typer.Option(
            help="`grid`, or `leaf`: as few tiles as cover 99 % of the leaf.",
            metavar="grid|leaf",
            rich_help_panel=TILES_PANEL,
        ),
    ] = "grid",
    stride: Annotated[
        int | None,
        typer.Option(
            help="Pixels from tile to tile of the grid; less than --tile overlaps.", rich_help_panel=TILES_PANEL
        ),
    ] = None,
    min_coverage: Annotated[
        float, typer.Option(help="Least share of leaf pixels in a tile.", rich_help_panel=TILES_PANEL)
    ] = 0.1,
    split: Annotated[
        tuple[float, float, float],
        typer.Option(help="Shares of tiles for train, val and test.", rich_help_panel=SPLIT_PANEL),
    ] = (0.7, 0.15, 0.15),
    split_by: Annotated[
        str,
        typer.Option(
            help="`image`, `block` of neighbouring tiles, or `auto`.",
            metavar="auto|image|block",
            rich_help_panel=SPLIT_PANEL,
        ),
    ] = "auto",
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Images stay together whose paths give the same for this: 'plant_(\\d+)'.",
            metavar="REGEX",
            rich_help_panel=SPLIT_PANEL,
        ),
    ] = None,
    gap_px: Annotated[
        int,
        typer.Option(
            help="Pixels between tiles of different splits in one image; 0 lets them touch.",
            rich_help_panel=SPLIT_PANEL,
        ),
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Decides which images or blocks go where.", rich_help_panel=SPLIT_PANEL)
    ] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes; one a CPU core if not given, fewer for little work.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="Make this part of the shards: 1/8 to 8/8 in a job array of 8.",
            metavar="I/N",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Complete the data set after all parts.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier data set.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
) -> None:
    """Cut images into tiles with leaf masks and write them as shards for training.

    What was killed goes on when the same command is given again.
    """
    with user_errors():
        options = PackOptions(
            band_files=tuple(filter(None, (name.strip() for name in band_files.split(",")))),
            wavelengths_nm=_numbers("--wavelengths", wavelengths),
            scale=scale,
            mask=mask,
            tile_px=tile,
            tiling=tiling,  # type: ignore[arg-type]  # checked by PackOptions
            stride_px=stride,
            min_coverage=min_coverage,
            split=split,
            split_by=split_by,  # type: ignore[arg-type]  # checked by PackOptions
            group_by=group_by,
            gap_px=gap_px,
            seed=seed,
            num_workers=workers,
            part=_part(part),
            merge=merge,
            overwrite=overwrite,
        )
        with progress("tiles") as advance_to:
            summary = pack_images(images, out, options, advance_to)
    if summary.shards_missing or part:
        _show_part(summary, out)
    else:
        _show(summary)


def _show(summary: PackSummary) -> None:
    console = Console(highlight=False)
    images = "1 image" if summary.num_images == 1 else f"{summary.num_images} images"
    console.print(f"{summary.out}: {images}, {summary.num_bytes / 1e6:.1f} MB", soft_wrap=True)
    table = Table()
    for heading in ("split", "tiles", "shards", "leaf pixels"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, num_tiles in summary.tiles.items():
        table.add_row(name, str(num_tiles), str(summary.num_shards[name]), f"{summary.leaf_pixels[name]:,}")
    console.print(table)
    covered = summary.leaf_pixels_covered / max(summary.leaf_pixels_in_images, 1)
    console.print(
        f"{summary.bands}, {summary.dtype}, tiles of {summary.tile_px} px, mean coverage {summary.coverage_mean:.2f}, "
        f"split by {summary.split_by}",
        soft_wrap=True,
    )
    before_gap = " before the gap" if summary.num_in_gap else ""
    console.print(
        f"tiles cover {covered:.1%} of {summary.leaf_pixels_in_images:,} leaf pixels{before_gap}", soft_wrap=True
    )
    if summary.dropped:
        console.print(_dropped(summary))
    for notice in summary.notices:
        console.print(f"note: {notice}", soft_wrap=True)


def _dropped(summary: PackSummary) -> Table:
    table = Table()
    table.add_column("dropped", justify="right")
    table.add_column("because")
    for reason, count in summary.dropped.items():
        table.add_row(str(count), reason)
    return table


def _show_part(summary: PackSummary, out: Path) -> None:
    num_shards = sum(summary.num_shards.values())
    Console(highlight=False).print(
        f"{num_shards - summary.shards_missing} of {num_shards} shards are made; {out} appears when all parts are, "
        "with --merge instead of --part",
        soft_wrap=True,
    )


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"--part is {text!r}, expected two numbers such as 1/8")
    return int(match[1]), int(match[2])


def _numbers(option: str, text: str) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        raise ValueError(f"{option} is {text!r}, expected numbers such as 475,560,668") from None
