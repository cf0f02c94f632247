"""Compare ways to run the loader while the model trains: reader threads, or reader processes.

python bench/step_with_loader.py [--tiles 640] [--rounds 5]

Prints medians over rounds in which the loaders take turns, with one torch thread. A step is AdamW on 32 tiles of
5 x 256 x 256 in micro batches of 8. Tiles are cropped to 64 px, as `data.crop_px` does it, so that the share
of reading is 16 times as large as with whole tiles. Every loader reads whole tiles and returns reflectance.

Columns: `time` is the duration of a step, including its wait for data, relative to a step on one batch in memory;
`wait` is the share of the step that is spent waiting; `cpu` is the CPU time of the training process alone, relative
to the same step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import torch
from peers import msvae, wds
from peers.stream import BATCH, TILE_PX, TILE_SHAPE, Batch, Stream
from torch import Tensor, multiprocessing

from msvae import AutoencoderKLMultispectralAdapter
from msvae.model.build import TINY_BACKBONE

CPU = torch.device("cpu")
NUM_STEPS = 30
NUM_SLOTS, MICRO_BATCH, SIDE_PX = 4, 8, 64
READ_AHEAD = 2 * NUM_SLOTS + 2
"""No loader prefetches more batches than this while others are measured. These batches are discarded."""
Figures = tuple[float, float, float]
"""Seconds per step, including waiting; share of this time that is spent waiting; CPU seconds per step."""


def endless(stream: Stream) -> Iterator[Batch]:
    """Yield complete batches, epoch after epoch."""
    while True:
        for tiles, masks in stream.floats():
            if len(tiles) == BATCH:
                yield tiles, masks.view(BATCH, 1, TILE_PX, TILE_PX) > 0


def in_memory(folder: Path) -> Iterator[Batch]:
    """Yield one batch again and again. No loader can be faster."""
    batch = next(endless(msvae.Reader(folder, 1, CPU)))
    while True:
        yield batch


def in_ring_process(folder: Path) -> Iterator[Batch]:
    """Yield batches of msvae's loader in a separate process, through shared memory that is allocated once."""
    context = multiprocessing.get_context("spawn")
    tiles = torch.zeros((NUM_SLOTS, BATCH, *TILE_SHAPE)).share_memory_()
    masks = torch.zeros((NUM_SLOTS, BATCH, 1, TILE_PX, TILE_PX), dtype=torch.bool).share_memory_()
    free, filled = context.Semaphore(NUM_SLOTS), context.Semaphore(0)
    context.Process(target=fill_ring, args=(folder, tiles, masks, free, filled), daemon=True).start()
    for slot in cycle(range(NUM_SLOTS)):
        filled.acquire()
        yield tiles[slot], masks[slot]
        free.release()


def fill_ring(folder: Path, tiles: Tensor, masks: Tensor, free: Semaphore, filled: Semaphore) -> None:
    """Run the reading process: copy every batch into the next free slot."""
    torch.set_num_threads(1)
    for slot, batch in zip(cycle(range(NUM_SLOTS)), endless(msvae.Reader(folder, 1, CPU)), strict=False):
        free.acquire()
        tiles[slot].copy_(batch[0])
        masks[slot].copy_(batch[1])
        filled.release()


def make_step() -> Callable[[Batch], None]:
    """Return a function that runs one optimizer step of a tiny model with all weights trained."""
    torch.manual_seed(0)
    model = AutoencoderKLMultispectralAdapter(**TINY_BACKBONE, adapter_width=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        tiles, masks = (part[..., :SIDE_PX, :SIDE_PX].split(MICRO_BATCH) for part in batch)
        for sample, mask in zip(tiles, masks, strict=True):
            losses = model(sample=sample, mask=mask)[1]
            (losses["mse"] + losses["sam"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Callable[[Batch], None], batches: Iterator[Batch]) -> Figures:
    """Measure steps, after discarding the batches that were prefetched while others were measured."""
    for _ in range(READ_AHEAD):
        next(batches)
    for _ in range(2):
        step(next(batches))
    began_s, began_cpu_s, waited_s = time.perf_counter(), time.process_time(), 0.0
    for _ in range(NUM_STEPS):
        now_s = time.perf_counter()
        batch = next(batches)
        waited_s += time.perf_counter() - now_s
        step(batch)
    elapsed_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return elapsed_s / NUM_STEPS, waited_s / elapsed_s, cpu_s / NUM_STEPS


def main() -> None:
    """Measure in turns and print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        msvae_shards, wds_shards = Path(temporary) / "msvae", Path(temporary) / "webdataset"
        for folder, peer in ((msvae_shards, msvae), (wds_shards, wds)):
            folder.mkdir()
            peer.write(folder, arguments.tiles)
        loaders: dict[str, Iterator[Batch]] = {
            "one batch in memory": in_memory(msvae_shards),
            "msvae, 1 thread": endless(msvae.Reader(msvae_shards, 1, CPU)),
            "msvae, 2 threads": endless(msvae.Reader(msvae_shards, 2, CPU)),
            "msvae in a process, ring": in_ring_process(msvae_shards),
            "webdataset, 1 worker": endless(wds.Reader(wds_shards, 1, CPU)),
        }
        for batches in loaders.values():
            next(batches)
        step = make_step()
        rounds = [{name: measure(step, loader) for name, loader in loaders.items()} for _ in range(arguments.rounds)]
        show(rounds)


def show(rounds: list[dict[str, Figures]]) -> None:
    """Print medians over the rounds; ratios are taken within a round."""
    limit = next(iter(rounds[0]))
    print(f"{statistics.median(r[limit][0] for r in rounds) * 1e3:.0f} ms per step on one batch in memory", flush=True)
    for name in rounds[0]:
        times, cpus = (sorted(r[name][figure] / r[limit][figure] for r in rounds) for figure in (0, 2))
        wait = statistics.median(r[name][1] for r in rounds)
        time_ratio, cpu_ratio = statistics.median(times), statistics.median(cpus)
        spread = f"({times[0]:.2f} to {times[-1]:.2f})"
        print(f"{name:>26}  time {time_ratio:.3f} {spread}  wait {wait:.2%}  cpu {cpu_ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
