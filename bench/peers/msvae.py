"""msvae: reader threads; order and resumption depend on the position alone (docs/streaming.md)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msvae.bands import DEFAULT_NAMES, DEFAULT_WAVELENGTHS_NM, LeafStatistics
from msvae.shards.loader import Loader
from msvae.shards.manifest import Manifest, ShardEntry, Shards
from msvae.shards.order import SampleOrder, training_plans
from msvae.shards.reader import ShardReader
from msvae.shards.sample_codec import Compression
from msvae.shards.writer import ShardWriter
from peers.stream import BANDS, BATCH, SCALE, TILE_PX, Batch, Stream, make_tile, rows_per_shard


def write(folder: Path, num_tiles: int, compression: Compression = "none") -> None:
    """Write tar shards and their manifest."""
    entries: list[ShardEntry] = []
    for number, rows in enumerate(rows_per_shard(num_tiles)):
        with ShardWriter(folder / f"leaf-{number:06d}.tar", compression) as shard:
            for row in rows:
                shard.write(f"tile_{row:06d}", *make_tile(row), {})
        assert shard.entry is not None
        entries.append(shard.entry)
    ones, identity = [1.0] * BANDS, np.eye(BANDS).tolist()
    Manifest(
        band_names=list(DEFAULT_NAMES),
        wavelengths_nm=list(DEFAULT_WAVELENGTHS_NM),
        dtype="uint16",
        tile_px=TILE_PX,
        scale=[SCALE] * BANDS,
        offset=[0.0] * BANDS,
        statistics=LeafStatistics(num_pixels=1, mean=ones, std=ones, minimum=ones, maximum=ones, covariance=identity),
        compression=compression,
        shards=Shards.of(entries),
    ).save(folder)


class Reader(Stream):
    """Stream of training batches from a position on."""

    def __init__(self, folder: Path, num_readers: int, device: torch.device, state: Any = None) -> None:
        super().__init__(device)
        self._reader, self._num_readers, self._position = ShardReader(folder), num_readers, state or 0
        self._batches: Iterator[Batch] | None = None
        self._stored = True

    def integers(self) -> Iterator[Batch]:
        """Yield one epoch of batches as stored."""
        return self._epoch(stored=True)

    def floats(self) -> Iterator[Batch]:
        """Yield one epoch of reflectance, converted by the loader itself."""
        return self._epoch(stored=False)

    def _epoch(self, stored: bool) -> Iterator[Batch]:
        if self._batches is None or stored != self._stored:
            self._batches, self._stored = self._open(stored), stored
        for batch in islice(self._batches, self._reader.manifest.num_samples // BATCH):
            self._position += 1
            yield batch

    def state(self) -> Any:
        """Return the position."""
        return self._position

    def _open(self, stored: bool) -> Iterator[Batch]:
        order = SampleOrder(self._reader.samples_per_shard, seed=0)
        plans = training_plans(
            order,
            global_batch_size=BATCH,
            micro_batch_size=BATCH,
            rank=0,
            world_size=1,
            position=self._position,
        )
        loader = Loader(
            self._reader, plans, batch_size=BATCH, num_workers=self._num_readers, device=self.device, stored=stored
        )
        return ((batch.tiles, batch.leaf_mask) for batch in loader)
