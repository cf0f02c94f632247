"""`msvae reconstruct`, `encode` and `decode`: commands that apply a trained model.

The commands import msvae.inference when they run, because it imports torch, which takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from msvae.cli.options import option, with_options
from msvae.cli.screen import progress, say, user_errors
from msvae.messages import counted
from msvae.rasters.options import ReadOptions

app = typer.Typer()

TIMEOUT_S = 6 * 3600.0
"""Timeout of collectives. A rank with fewer shards waits in one until the other ranks have encoded theirs."""
STOPPED = "stopped; run the same command again to continue"
Model = Annotated[str, typer.Argument(help="A trained model: folder, such as RUN/best, or hub id.", metavar="MODEL")]
Device = Annotated[str, option("Model", "cpu, cuda or cuda:1; auto is a GPU if there is one, else the CPU.")]


@app.command()
@with_options(ReadOptions)
def reconstruct(
    model: Model,
    image: Annotated[
        Path, typer.Argument(help="A raster that GDAL reads, a .npy array, or a folder of them.", metavar="IMAGE")
    ],
    out: Annotated[
        Path, typer.Argument(help="File to write (.tif, .npy), or a folder in which images keep their names.")
    ],
    *,
    tile: Annotated[int, option("Model", "Side of the windows that the model sees, in pixels.")] = 1024,
    batch_size: Annotated[int, option("Model", "Windows in one batch of the model.")] = 1,
    device: Device = "auto",
    overwrite: Annotated[bool, option("Output", "Replace existing files.", "--overwrite")] = False,
    options: ReadOptions,
) -> None:
    """Reconstruct images of any size and write them with the type, scale, nodata and georeference of the input.

    Only leaf pixels are reconstructed. Background becomes nodata; without a nodata value it becomes NaN, or 0 in files
    of integers, and then a mask band of the GeoTIFF marks it.
    """
    with user_errors():
        from msvae.inference.reconstruct import ReconstructOptions
        from msvae.inference.reconstruct import reconstruct as reconstruct_images

        reconstruct_options = ReconstructOptions(
            tile_px=tile, batch_size=batch_size, device=device, overwrite=overwrite
        )
        with progress("windows") as advance_to:
            done = reconstruct_images(model, image, out, options, reconstruct_options, advance_to)
    for each in done:
        if (summary := each.summary) is None:
            say(f"{each.image} has no leaf pixel, so no file was written; give another --mask if it shows leaves")
            continue
        angle = "" if summary.angle_deg is None else f", spectral angle {summary.angle_deg:.2f} degrees"
        say(
            f"{each.path}: {counted(summary.num_leaf_pixels, 'leaf pixel')}, PSNR {summary.psnr_db:.2f} dB{angle} "
            "against the image"
        )
    for notice in dict.fromkeys(notice for each in done for notice in each.notices):
        say(f"note: {notice}")


@app.command()
def encode(
    model: Model,
    shards: Annotated[str, typer.Argument(help="Folder or URL of a dataset, or of one split.", metavar="SHARDS")],
    out: Annotated[
        Path, typer.Argument(help="Folder for the latents, and for a copy of the model with their factors.")
    ],
    kind: Annotated[
        str,
        typer.Option(
            help="moments: mean and log variance of the posterior; sample: one sample from it.",
            metavar="moments|sample",
        ),
    ] = "moments",
    dtype: Annotated[str, typer.Option(help="Type of the latents.", metavar="float32|float16")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Random seed of --kind sample.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Number of tiles in a forward pass.")] = 8,
) -> None:
    """Encode shards of tiles into shards of latents for diffusion training.

    `accelerate launch --config_file FILE --module msvae encode MODEL SHARDS OUT` runs it on several processes and
    writes the same bytes. A run that was killed continues if the same command is run again.
    """

    def work() -> None:
        from msvae.distributed.setup import check_writable, join_ranks
        from msvae.inference.encode import encode as encode_shards
        from msvae.inference.encoder import EncodeOptions

        encode_options = EncodeOptions(kind=kind, dtype=dtype, seed=seed, batch_size=batch_size)  # type: ignore[arg-type]
        check_writable(out)
        ranks = join_ranks(TIMEOUT_S)
        with progress("tiles of this rank") if ranks.is_main else nullcontext() as advance_to:
            manifests = encode_shards(model, shards, out, encode_options, ranks, advance_to)
        if not ranks.is_main:
            return
        for split, manifest in manifests.items():
            say(f"{out / split}: {counted(manifest.num_samples, 'tile')}, {manifest.kind} of shape {manifest.shape}")
        manifest = next(iter(manifests.values()))
        say(
            f"{out / 'model'}: the model with shift_factor {manifest.shift_factor:.4f} and scaling_factor "
            f"{manifest.scaling_factor:.4f} in its config.json; {model} is unchanged"
        )

    _run_on_this_rank(work)


@app.command()
def decode(
    model: Model,
    latents: Annotated[
        str, typer.Argument(help="Output folder of `encode`, or a .npy file (B, channels, h, w).", metavar="LATENTS")
    ],
    out: Annotated[
        Path, typer.Argument(help="New folder for shards of tiles, or for one GeoTIFF per latent of a .npy file.")
    ],
    unscaled: Annotated[
        bool,
        typer.Option("--unscaled", help="The .npy file holds outputs of the encoder, not shifted and scaled."),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Number of latents in a forward pass.")] = 8,
    device: Device = "auto",
) -> None:
    """Decode latents into reflectance."""
    with user_errors():
        from msvae.inference.decode import decode as decode_latents

        with progress("tiles") as advance_to:
            number = decode_latents(
                model, latents, out, unscaled=unscaled, batch_size=batch_size, device=device, on_progress=advance_to
            )
    say(f"{out}: {counted(number, 'tile')} of reflectance")


def _run_on_this_rank(work: Callable[[], None]) -> None:
    """Run the command as one rank of `accelerate launch`, or as a single process without a launcher."""
    if "RANK" not in os.environ:
        with user_errors(STOPPED):
            return work()
    from msvae.distributed.exit_codes import run_script

    run_script(work, STOPPED)
