"""msvae on compressed shards: the same loader on tiles packed with blosc2."""

from __future__ import annotations

from pathlib import Path

from peers.msvae import Reader

__all__ = ["Reader", "write"]


def write(folder: Path, num_tiles: int) -> None:
    """Tar shards with compressed tiles."""
    raise ValueError("msvae writes no compressed shards yet; once ShardWriter does, write them here")
