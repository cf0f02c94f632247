"""Tiles per second from local shards to float batches: msvae, webdataset, and the raw reads as the limit.

python bench/loader.py [--tiles 2000] [--workers 1]; prints medians of three rounds that take turns, as ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from msvae.bands import DEFAULT_NAMES, DEFAULT_WAVELENGTHS_NM
from msvae.shards.loader import Loader
from msvae.shards.manifest import LeafStatistics, Manifest, ShardEntry, ShardIndex, Shards
from msvae.shards.order import SampleOrder, training_plans
from msvae.shards.reader import ShardReader
from msvae.shards.store import open_store
from msvae.shards.tar import ShardWriter

TILE_PX, BANDS, BATCH, SHARDS, ROUNDS = 256, 5, 32, 16, 3


def write_shards(folder: Path, num_tiles: int) -> None:
    """Noise tiles of 12 bits, spread over 16 shards."""
    random = np.random.default_rng(0)
    entries: list[ShardEntry] = []
    for number, rows in enumerate(np.array_split(np.arange(num_tiles), SHARDS)):
        with ShardWriter(folder / f"leaf-{number:06d}.tar") as shard:
            for row in rows:
                tile = random.integers(0, 4096, (BANDS, TILE_PX, TILE_PX), dtype=np.uint16)
                shard.write(f"tile_{row:06d}", tile, tile[0] > 2048, {})
        assert shard.entry is not None
        entries.append(shard.entry)
    ones, identity = [1.0] * BANDS, np.eye(BANDS).tolist()
    unit = LeafStatistics(num_pixels=1, mean=ones, std=ones, minimum=ones, maximum=ones, covariance=identity)
    Manifest(
        band_names=list(DEFAULT_NAMES),
        wavelengths_nm=list(DEFAULT_WAVELENGTHS_NM),
        dtype="uint16",
        tile_px=TILE_PX,
        scale=[1e-4] * BANDS,
        offset=[0.0] * BANDS,
        statistics=unit,
        shards=Shards.of(entries),
    ).save(folder)


def msvae_batches(folder: Path, num_workers: int) -> Iterator[torch.Tensor]:
    """Float tiles through msvae's loader, in training order."""
    reader = ShardReader(folder)
    order = SampleOrder(reader.samples_per_shard, seed=0)
    plans = training_plans(order, global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1, position=0)
    loader = Loader(reader, plans, batch_size=BATCH, num_workers=num_workers, device=torch.device("cpu"))
    return (batch.tiles for batch in islice(loader, reader.manifest.num_samples // BATCH))


def webdataset_batches(folder: Path, num_workers: int) -> Iterator[torch.Tensor]:
    """Float tiles through webdataset as its documentation recommends: shuffle, decode, batch, WebLoader."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=100).shuffle(1000).decode("l8").to_tuple("bands.npy", "mask.png")
    loader = wds.WebLoader(dataset.batched(BATCH), batch_size=None, num_workers=num_workers)
    return (torch.as_tensor(tiles).float() * 1e-4 for tiles, _ in loader)


def raw_reads(folder: Path, num_workers: int) -> Iterator[torch.Tensor]:
    """The bands members alone, read into one buffer: no decoding, no conversion."""
    manifest, buffer = Manifest.load(folder), bytearray(TILE_PX * TILE_PX * BANDS * 2 + 128)
    batch = torch.empty(BATCH, 1)
    for shard in manifest.shards:
        index, descriptor = ShardIndex.load(open_store(folder), shard), os.open(folder / shard.name, os.O_RDONLY)
        for start in range(0, shard.num_samples, BATCH):
            offsets = index.bands_offset[start : start + BATCH]
            for offset in offsets:
                os.preadv(descriptor, [buffer], offset)
            yield batch[: len(offsets)]
        os.close(descriptor)


def tiles_per_s(batches: Iterator[torch.Tensor]) -> float:
    """Rate from the first request to the last batch."""
    began_s = time.perf_counter()
    num_tiles = sum(len(batch) for batch in batches)
    return num_tiles / (time.perf_counter() - began_s)


def main() -> None:
    """Measure in turns and print ratios to webdataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    contenders: dict[str, Callable[[Path, int], Iterator[torch.Tensor]]] = {
        "webdataset": webdataset_batches,
        "msvae": msvae_batches,
        "raw reads": raw_reads,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder, arguments.tiles)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, batches in contenders.items():
                rates[name].append(tiles_per_s(batches(folder, arguments.workers)))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"{name:>10}: {median / medians['webdataset']:5.2f}x webdataset ({median:.0f} tiles/s)")


if __name__ == "__main__":
    main()
