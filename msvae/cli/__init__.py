"""The `msvae` command: what it takes from the command line and what it shows. The work is done in the rooms below."""

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
