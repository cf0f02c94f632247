"""Finding the members of a tar: msvae's walk over the headers against tarfile and webdataset's iterator.

python bench/index.py [--tiles 2000]; prints medians of five rounds that take turns, as ratios. webdataset has no index
of its own: its iterator, which reads all contents, is what tells where samples are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset as wds

from msvae.shards.audit.walk import walk
from msvae.shards.tar import ShardWriter

ROUNDS = 5


def walked(path: Path) -> int:
    """Members found by msvae."""
    with path.open("rb") as tar:
        descriptor = tar.fileno()
        return sum(1 for _ in walk(lambda at, length: os.pread(descriptor, length, at), path.stat().st_size))


def listed(path: Path) -> int:
    """Members found by tarfile."""
    with tarfile.open(path, "r:") as tar:
        return sum(1 for _ in tar)


def iterated(path: Path) -> int:
    """Members found by webdataset."""
    with path.open("rb") as tar:
        return sum(1 for _ in wds.tariterators.tar_file_iterator(tar))


def main() -> None:
    """Write one shard, find its members in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=2000)
    tiles = parser.parse_args().tiles
    finders: dict[str, Callable[[Path], int]] = {"msvae": walked, "tarfile": listed, "webdataset": iterated}
    seconds: dict[str, list[float]] = {name: [] for name in finders}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "leaf-000000.tar"
        tile, mask = np.zeros((5, 128, 128), np.uint16), np.ones((128, 128), bool)
        with ShardWriter(path) as shard:
            for row in range(tiles):
                shard.write(f"tile_{row:06d}", tile, mask, {})
        for _ in range(ROUNDS):
            for name, find in finders.items():
                start = time.perf_counter()
                assert find(path) == 3 * tiles
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{tiles} tiles, median of {ROUNDS}: " + ", ".join(f"{n} {s:.3f} s" for n, s in medians.items()))
    for name in ("tarfile", "webdataset"):
        print(f"walking the headers: {medians[name] / medians['msvae']:.1f}x the speed of {name}")


if __name__ == "__main__":
    main()
