"""python -m msvae, which accelerate launch --module needs."""

from msvae.cli import app

if __name__ == "__main__":
    app()
