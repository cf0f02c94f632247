"""Limits of a loader on one thread: reading msvae's members, copying the same bytes, converting them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from msvae.shards.manifest import Manifest, ShardIndex
from msvae.shards.stores import open_store
from peers.stream import BATCH, SCALE, TILE_SHAPE

NUM_COPIES = 20
"""Number of batches copied or converted for one figure."""


def limits(folder: Path) -> dict[str, float]:
    """Return tiles/s of each limit on one thread, from the page cache, into memory that was allocated before."""
    stored = torch.randint(0, 4096, (BATCH, *TILE_SHAPE), dtype=torch.uint16)
    copied, floats = stored.clone(), torch.ones(stored.shape)
    _pread_all(folder)
    return {
        "pread": _rate(lambda: _pread_all(folder)),
        "memcpy": _rate(lambda: _repeat(lambda: np.copyto(copied.numpy(), stored.numpy()))),
        "uint16 to float32": _rate(lambda: _repeat(lambda: floats.copy_(stored).mul_(SCALE))),
    }


def _pread_all(folder: Path) -> int:
    manifest, buffer = Manifest.load(folder), bytearray(1 << 20)
    for shard in manifest.shards:
        index, descriptor = ShardIndex.load(open_store(folder), shard), os.open(folder / shard.name, os.O_RDONLY)
        for row in range(shard.num_samples):
            for start, size in (
                (index.bands_offset[row], index.bands_bytes[row]),
                (index.mask_offset[row], index.mask_bytes[row]),
            ):
                os.preadv(descriptor, [memoryview(buffer)[:size]], start)
        os.close(descriptor)
    return manifest.num_samples


def _repeat(act: Callable[[], object]) -> int:
    for _ in range(NUM_COPIES):
        act()
    return NUM_COPIES * BATCH


def _rate(act: Callable[[], int]) -> float:
    began_s = time.perf_counter()
    return act() / (time.perf_counter() - began_s)
