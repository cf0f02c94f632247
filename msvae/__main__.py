"""Entry point of `python -m msvae`; `accelerate launch --module msvae` starts it on every rank."""

from msvae.cli import app

if __name__ == "__main__":
    app(prog_name="msvae")
