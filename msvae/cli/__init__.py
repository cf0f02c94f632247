"""The `msvae` command: parses the command line and prints results. Other packages do the work."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from msvae.cli import data, doctor, model, pack

app = typer.Typer(
    help="Multispectral leaf autoencoders: make shards here, train with `accelerate launch train/train.py`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(pack.app)
app.add_typer(data.app)
app.add_typer(doctor.app)
app.add_typer(model.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"msvae {importlib.metadata.version('msvae')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Read the options in front of a command."""
