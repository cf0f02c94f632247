"""`python -m msvae`, which `accelerate launch --module msvae` starts on every rank."""

from msvae.cli import app

if __name__ == "__main__":
    app(prog_name="msvae")
