"""The `msvae` command: parses the command line and prints results. Other packages do the work."""

from __future__ import annotations

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
