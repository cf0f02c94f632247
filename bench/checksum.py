"""Measure the CPU time of checksums, relative to the CPU time of a reader and of a training step on the same tiles.

python bench/checksum.py [--tiles 200]

Tiles are 5 x 256 x 256 uint16 from the page cache. Prints medians of rounds that take turns. The step is a forward and
backward pass of the tiny model, the cheapest model available; with any other model the share is smaller.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from crc32c import crc32c
from peers.msvae import write

from msvae import AutoencoderKLMultispectralAdapter
from msvae.model.build import TINY_BACKBONE
from msvae.shards.reader import ShardReader

ROUNDS = 5
TILES_PER_STEP = 4


def main() -> None:
    """Measure in turns and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=200)
    num_tiles = parser.parse_args().tiles
    torch.set_num_threads(1)
    model = AutoencoderKLMultispectralAdapter(**TINY_BACKBONE)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), num_tiles)
        reader = ShardReader(folder)
        tile, leaf_mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], np.bool_)

        def read() -> None:
            for shard, num_rows in enumerate(reader.samples_per_shard):
                for row in range(num_rows):
                    reader.read_into(shard, row, tile, leaf_mask)

        def check() -> None:
            for _ in range(num_tiles):
                crc32c(tile.data.cast("B"))

        def step() -> None:
            tiles = torch.from_numpy(np.stack([tile] * TILES_PER_STEP).astype(np.float32) * 1e-4)
            _, losses = model(sample=tiles, mask=torch.from_numpy(np.stack([leaf_mask[None]] * TILES_PER_STEP)))
            losses["mse"].backward()

        read()
        step()
        shares = [
            (check_s / cpu_s(read), check_s / num_tiles / (cpu_s(step) / TILES_PER_STEP))
            for check_s in (cpu_s(check) for _ in range(ROUNDS))
        ]
    of_reader, of_step = map(statistics.median, zip(*shares, strict=True))
    print(f"checksums: {of_reader:.1%} of the CPU time of a reader, {of_step:.3%} of the CPU time of a step")


def cpu_s(act: Callable[[], None]) -> float:
    """Return the CPU time that this process spends in a call, in seconds."""
    began_s = time.process_time()
    act()
    return time.process_time() - began_s


if __name__ == "__main__":
    main()
