"""A training step beside the loader that feeds it: readers as threads of the training process, or elsewhere.

python bench/beside_step.py [--tiles 640] [--rounds 5]; medians of rounds that take turns, one torch thread.
Steps of AdamW on 32 tiles of 5 x 256 x 256 in micro batches of 8, cut as `data.crop_px` cuts them: at 64 px reading
weighs 16 times what it does on whole tiles. Each way reads whole tiles and hands over reflectance. `time` is of a step
with its wait for data, over that of a step on one batch in memory; `wait` is the share of it that waits; `cpu` is that
of the training process alone.
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
"""Batches that no way has more of in stock when its turn comes; they are thrown away."""
Figures = tuple[float, float, float]
"""Seconds a step, waiting included; share of them that waited; CPU seconds a step of this process."""


def endless(stream: Stream) -> Iterator[Batch]:
    """Epoch after epoch, whole batches."""
    while True:
        for tiles, masks in stream.floats():
            if len(tiles) == BATCH:
                yield tiles, masks.view(BATCH, 1, TILE_PX, TILE_PX) > 0


def in_memory(folder: Path) -> Iterator[Batch]:
    """The limit: one batch, again and again."""
    batch = next(endless(msvae.Reader(folder, 1, CPU)))
    while True:
        yield batch


def in_a_ring(folder: Path) -> Iterator[Batch]:
    """msvae's loader in a process of its own, which copies batches into shared memory that is allocated once."""
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
    """The other process."""
    torch.set_num_threads(1)
    for slot, batch in zip(cycle(range(NUM_SLOTS)), endless(msvae.Reader(folder, 1, CPU)), strict=False):
        free.acquire()
        tiles[slot].copy_(batch[0])
        masks[slot].copy_(batch[1])
        filled.release()


def trainer() -> Callable[[Batch], None]:
    """One optimizer step of a tiny model that is trained as a whole."""
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


def measure(step: Callable[[Batch], None], feed: Iterator[Batch]) -> Figures:
    """Steps after what was read ahead while others were measured is used up."""
    for _ in range(READ_AHEAD):
        next(feed)
    for _ in range(2):
        step(next(feed))
    began_s, began_cpu_s, waited_s = time.perf_counter(), time.process_time(), 0.0
    for _ in range(NUM_STEPS):
        now_s = time.perf_counter()
        batch = next(feed)
        waited_s += time.perf_counter() - now_s
        step(batch)
    elapsed_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return elapsed_s / NUM_STEPS, waited_s / elapsed_s, cpu_s / NUM_STEPS


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary) / "msvae", Path(temporary) / "webdataset"
        for folder, peer in ((ours, msvae), (theirs, wds)):
            folder.mkdir()
            peer.write(folder, arguments.tiles)
        feeds: dict[str, Iterator[Batch]] = {
            "one batch in memory": in_memory(ours),
            "msvae, 1 thread": endless(msvae.Reader(ours, 1, CPU)),
            "msvae, 2 threads": endless(msvae.Reader(ours, 2, CPU)),
            "msvae in a process, ring": in_a_ring(ours),
            "webdataset, 1 worker": endless(wds.Reader(theirs, 1, CPU)),
        }
        for feed in feeds.values():
            next(feed)
        step = trainer()
        show([{way: measure(step, feed) for way, feed in feeds.items()} for _ in range(arguments.rounds)])


def show(rounds: list[dict[str, Figures]]) -> None:
    """Medians over the rounds; ratios are taken within a round."""
    limit = next(iter(rounds[0]))
    print(f"{statistics.median(r[limit][0] for r in rounds) * 1e3:.0f} ms a step on one batch in memory", flush=True)
    for way in rounds[0]:
        times, cpus = (sorted(r[way][figure] / r[limit][figure] for r in rounds) for figure in (0, 2))
        wait = statistics.median(r[way][1] for r in rounds)
        time_ratio, cpu_ratio = statistics.median(times), statistics.median(cpus)
        spread = f"({times[0]:.2f} to {times[-1]:.2f})"
        print(f"{way:>26}  time {time_ratio:.3f} {spread}  wait {wait:.2%}  cpu {cpu_ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
