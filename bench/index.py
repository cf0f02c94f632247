"""Compare three ways to list the members of a tar: msvae's walk over headers, tarfile, and webdataset's iterator.

python bench/index.py [--tiles 2000]

Prints medians of five rounds that take turns, and ratios. webdataset 1.0 has no index: only its iterator, which reads
all contents, finds the samples.
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
from msvae.shards.writer import ShardWriter

ROUNDS = 5


def count_with_msvae(path: Path) -> int:
    """Return the number of members that msvae finds."""
    with path.open("rb") as tar:
        descriptor = tar.fileno()
        return sum(1 for _ in walk(lambda at, length: os.pread(descriptor, length, at), path.stat().st_size))


def count_with_tarfile(path: Path) -> int:
    """Return the number of members that tarfile finds."""
    with tarfile.open(path, "r:") as tar:
        return sum(1 for _ in tar)


def count_with_webdataset(path: Path) -> int:
    """Return the number of members that webdataset finds."""
    with path.open("rb") as tar:
        return sum(1 for _ in wds.tariterators.tar_file_iterator(tar))


def main() -> None:
    """Write one shard, and count its members in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=2000)
    tiles = parser.parse_args().tiles
    counters: dict[str, Callable[[Path], int]] = {
        "msvae": count_with_msvae,
        "tarfile": count_with_tarfile,
        "webdataset": count_with_webdataset,
    }
    seconds: dict[str, list[float]] = {name: [] for name in counters}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "leaf-000000.tar"
        tile, mask = np.zeros((5, 128, 128), np.uint16), np.ones((128, 128), bool)
        with ShardWriter(path) as shard:
            for row in range(tiles):
                shard.write(f"tile_{row:06d}", tile, mask, {})
        for _ in range(ROUNDS):
            for name, count in counters.items():
                start = time.perf_counter()
                assert count(path) == 3 * tiles
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{tiles} tiles, median of {ROUNDS}: " + ", ".join(f"{n} {s:.3f} s" for n, s in medians.items()))
    for name in ("tarfile", "webdataset"):
        print(f"walking the headers: {medians[name] / medians['msvae']:.1f}x the speed of {name}")


if __name__ == "__main__":
    main()
