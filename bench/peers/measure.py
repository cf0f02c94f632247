"""Run one measurement in this process: `python -m peers.measure ACT PEER FOLDER TILES READERS` prints JSON.

ACT is `write`, `epochs` (which saves the state after half an epoch to FOLDER.state), `resume` or `limits`.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import torch

from peers.stream import BATCH, Batch, Stream, rows_of, rows_per_shard

SAMPLE_EVERY_S = 0.1


class PeakMemory:
    """Peak of anonymous + shared memory of this process and its descendants while the `with` block runs.

    Each page counts once, divided among the processes that map it (PSS). Pages of files, such as libraries and the
    chunks that litdata maps, do not count, because the kernel can reclaim them at any time.
    """

    def __enter__(self) -> PeakMemory:
        self.peak_mb, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        here = psutil.Process()
        while not self._over.wait(SAMPLE_EVERY_S):
            processes = [here, *here.children(recursive=True)]
            self.peak_mb = max(self.peak_mb, sum(map(_anonymous_and_shared_mb, processes)))


def _anonymous_and_shared_mb(process: psutil.Process) -> float:
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) * 1024 / 1e6


def distinct_shards(batches: list[list[int]], num_tiles: int) -> float:
    """Return the mean number of distinct shards, of 16, in a batch of 32 tiles; 13.97 for a uniform shuffle."""
    shard_of = {row: shard for shard, rows in enumerate(rows_per_shard(num_tiles)) for row in rows}
    return mean(len({shard_of[row] for row in batch}) for batch in batches if len(batch) == BATCH)


def rate(batches: Iterator[Batch], floats: bool) -> tuple[float, float]:
    """Return tiles/s of an epoch, and CPU time of all processes in us/tile, which depends less on other load."""
    began_s, began_cpu_s = time.perf_counter(), _cpu_s()
    num_tiles = 0
    for tiles, _ in batches:
        assert tiles.is_floating_point() == floats, tiles.dtype
        num_tiles += len(tiles)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return num_tiles / (time.perf_counter() - began_s), (_cpu_s() - began_cpu_s) / num_tiles * 1e6


def _cpu_s() -> float:
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def first_batch(
    module: Any, folder: Path, num_readers: int, state: Any
) -> tuple[Stream, Iterator[Batch], Batch, float]:
    """Open a loader. Return it with its first batch, and the seconds until this batch is on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.empty(1, device=device)
    began_s = time.perf_counter()
    stream: Stream = module.Reader(folder, num_readers, device, state)
    batches = stream.integers()
    batch = next(batches)
    rows_of(batch[0])
    return stream, batches, batch, time.perf_counter() - began_s


def epochs(module: Any, folder: Path, num_tiles: int, num_readers: int) -> dict[str, float]:
    """Record the order of the first epoch, then time one epoch of integers and one of floats."""
    stream, rest, batch, first_batch_s = first_batch(module, folder, num_readers, None)
    half, seen = num_tiles // BATCH // 2, [rows_of(batch[0])]
    assert batch[1].shape[-2:] == batch[0].shape[-2:], batch[1].shape
    del batch
    with PeakMemory() as memory:
        for number, (tiles, _) in enumerate(rest, start=2):
            seen.append(rows_of(tiles))
            if number == half:
                torch.save(stream.state(), folder.with_suffix(".state"))
    folder.with_suffix(".seen").write_text(json.dumps(seen))
    integers_per_s, integers_cpu_us = rate(stream.integers(), floats=False)
    if type(stream).floats is not Stream.floats:
        rate(stream.floats(), floats=True)
    floats_per_s, floats_cpu_us = rate(stream.floats(), floats=True)
    return {
        "first_batch_s": first_batch_s,
        "memory_mb": memory.peak_mb,
        "distinct_shards": distinct_shards(seen, num_tiles),
        "tiles_seen": len({row for batch in seen for row in batch}) / num_tiles,
        "integers_per_s": integers_per_s,
        "integers_cpu_us": integers_cpu_us,
        "floats_per_s": floats_per_s,
        "floats_cpu_us": floats_cpu_us,
    }


def resume(module: Any, folder: Path, num_tiles: int, num_readers: int) -> dict[str, float]:
    """Resume after half an epoch, and compare the first batch to the batch that followed in the first run."""
    # The process before this one wrote the file. States of other loaders contain objects, which need unpickling.
    state = torch.load(folder.with_suffix(".state"), weights_only=False)
    _, _, (tiles, _), resumed_s = first_batch(module, folder, num_readers, state)
    came_next = json.loads(folder.with_suffix(".seen").read_text())[num_tiles // BATCH // 2]
    return {"resumed_s": resumed_s, "resumed_exactly": float(rows_of(tiles) == came_next)}


def main() -> None:
    """Run one act and print its figures."""
    act, peer, path, tiles, readers = sys.argv[1:]
    folder, num_tiles, num_readers = Path(path), int(tiles), int(readers)
    torch.set_num_threads(1)
    module = importlib.import_module(f"peers.{peer}")
    figures: dict[str, float] = {}
    if act == "write":
        folder.mkdir()
        module.write(folder, num_tiles)
    elif act == "limits":
        figures = module.limits(folder)
    else:
        figures = {"epochs": epochs, "resume": resume}[act](module, folder, num_tiles, num_readers)
    print("\n" + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
