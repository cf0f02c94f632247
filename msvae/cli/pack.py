"""`msvae synth` and `msvae pack`: leaf images, and shards of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from msvae.cli.screen import numbers, progress, user_errors
from msvae.pack.job import pack as pack_images
from msvae.pack.options import PackOptions, PackSummary
from msvae.pack.synthetic.images import synthesise

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
    Console().print(f"{images} leaf images and their masks are in {out}", soft_wrap=True, highlight=False)


@app.command()
def pack(
    images: Annotated[list[Path], typer.Argument(help="Rasters, or folders of rasters.", metavar="IMAGE…")],
    out: Annotated[Path, typer.Option(help="Folder for train/, val/ and test/.")],
    band_files: Annotated[
        str, typer.Option(help="One-band files that make up an image, comma-separated; each IMAGE is a folder then.")
    ] = "",
    wavelengths: Annotated[str, typer.Option(help="Bands to take, in nm, comma-separated: 475,560,668,717,840.")] = "",
    scale: Annotated[float | None, typer.Option(help="Reflectance of the stored value 1, such as 0.0001.")] = None,
    mask: Annotated[
        str, typer.Option(help="`auto`: NAME_mask file, else nodata; or an index such as 'ndvi>0.10'.")
    ] = "auto",
    tile: Annotated[int, typer.Option(help="Side of a tile in pixels, a multiple of 8.")] = 256,
    min_coverage: Annotated[float, typer.Option(help="Least share of leaf pixels in a tile.")] = 0.1,
    split: Annotated[tuple[float, float, float], typer.Option(help="Shares of tiles for train, val and test.")] = (
        0.7,
        0.15,
        0.15,
    ),
    split_by: Annotated[
        str, typer.Option(help="`image`, `block` of neighbouring tiles, or `auto`.", metavar="auto|image|block")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Decides which images or blocks go where.")] = 0,
    compress: Annotated[bool, typer.Option("--compress", help="Store tiles compressed, without loss.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier data set.")] = False,
) -> None:
    """Cut images into tiles with leaf masks and write them as shards for training."""
    with user_errors():
        options = PackOptions(
            band_files=tuple(filter(None, (name.strip() for name in band_files.split(",")))),
            wavelengths_nm=numbers("--wavelengths", wavelengths),
            scale=scale,
            mask=mask,
            tile_px=tile,
            min_coverage=min_coverage,
            split=split,
            split_by=split_by,  # type: ignore[arg-type]  # checked by PackOptions
            seed=seed,
            compress=compress,
            overwrite=overwrite,
        )
        with progress("tiles") as advance_to:
            summary = pack_images(images, out, options, advance_to)
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
    console.print(
        f"{summary.bands}, {summary.dtype}, tiles of {summary.tile_px} px, mean coverage {summary.coverage_mean:.2f}, "
        f"split by {summary.split_by}",
        soft_wrap=True,
    )
    for reason, count in summary.dropped.items():
        console.print(f"dropped {count}: {reason}", soft_wrap=True)
    for notice in summary.notices:
        console.print(f"note: {notice}", soft_wrap=True)
