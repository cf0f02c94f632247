"""webdataset as in its README: shuffled shards, a shuffle buffer of 1,000, batches made by workers, WebLoader.

Its examples also shuffle samples of all workers in the main process (`unbatched().shuffle(1000).batched()`). This is
left out here, because it copies every tile once more and would make webdataset slower. webdataset does not document
how to resume, so the resumed loader uses the same seed and skips the batches that were seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset

from peers.stream import BATCH, Batch, Stream, encode_mask, make_tile, rows_per_shard


def write(folder: Path, num_tiles: int) -> None:
    """Write tar shards."""
    for number, rows in enumerate(rows_per_shard(num_tiles)):
        with webdataset.TarWriter(str(folder / f"leaf-{number:06d}.tar")) as tar:
            for row in rows:
                tile, leaf_mask = make_tile(row)
                tar.write({"__key__": f"tile_{row:06d}", "bands.npy": tile, "mask.png": encode_mask(leaf_mask)})


class Reader(Stream):
    """Stream of persistent worker processes."""

    def __init__(self, folder: Path, num_readers: int, device: torch.device, state: Any = None) -> None:
        super().__init__(device)
        urls = sorted(str(path) for path in folder.glob("*.tar"))
        dataset = (
            webdataset.WebDataset(urls, shardshuffle=100, detshuffle=True, seed=0)
            .compose(webdataset.detshuffle(1000))
            .decode("l8")
            .to_tuple("bands.npy", "mask.png")
            .batched(BATCH)
        )
        self._loader = webdataset.WebLoader(
            dataset,
            batch_size=None,
            num_workers=num_readers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )
        self._num_seen, self._skip = 0, state or 0

    def integers(self) -> Iterator[Batch]:
        """Yield the batches of one pass over the loader."""
        self._num_seen, skip, self._skip = self._skip, self._skip, 0
        for tiles, masks in islice(self._loader, skip, None):
            self._num_seen += 1
            yield torch.as_tensor(tiles).to(self.device), torch.as_tensor(masks).to(self.device)

    def state(self) -> Any:
        """Return how many batches of this epoch to skip."""
        return self._num_seen
