"""msvae with compressed shards: the same loader on tiles packed with `--compress`."""

from __future__ import annotations

from pathlib import Path

from peers import msvae
from peers.msvae import Reader

__all__ = ["Reader", "write"]


def write(folder: Path, num_tiles: int) -> None:
    """Write tar shards with compressed tiles."""
    msvae.write(folder, num_tiles, "delta-blosc2")
