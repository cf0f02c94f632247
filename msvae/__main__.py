"""`python -m msvae`, which `accelerate launch --module msvae` starts on every rank."""

from msvae.cli import app

app(prog_name="msvae")
