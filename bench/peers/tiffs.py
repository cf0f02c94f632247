"""Folder of TIFFs: torch's DataLoader over a dataset of files; tifffile reads tiles, Pillow reads masks.

Settings from torch's performance guide: persistent worker processes, pinned memory for CUDA. torch does not document
how to resume. The sampler here derives its order from a seed and starts in the middle of it, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tifffile
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from peers.stream import BATCH, Batch, Stream, decode_mask, encode_mask, make_tile


def write(folder: Path, num_tiles: int) -> None:
    """Write two uncompressed files per tile."""
    for row in range(num_tiles):
        tile, leaf_mask = make_tile(row)
        tifffile.imwrite(folder / f"tile_{row:06d}.tif", tile, photometric="minisblack", planarconfig="separate")
        (folder / f"tile_{row:06d}.png").write_bytes(encode_mask(leaf_mask))


class Tiles(Dataset[Any]):
    """Dataset of tiles and masks."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.tif"))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        file = self._files[row]
        return tifffile.imread(file), decode_mask(file.with_suffix(".png").read_bytes())


class SeededOrder(Sampler[int]):
    """Sampler with a new uniform shuffle in every epoch, the first one from `start` on."""

    def __init__(self, length: int, start: int) -> None:
        self._length, self._start, self._epoch = length, start, -1

    def __iter__(self) -> Iterator[int]:
        self._epoch += 1
        order = torch.randperm(self._length, generator=torch.Generator().manual_seed(self._epoch)).tolist()
        start, self._start = self._start, 0
        yield from order[start:]

    def __len__(self) -> int:
        return self._length


class Reader(Stream):
    """Stream of DataLoader."""

    def __init__(self, folder: Path, num_readers: int, device: torch.device, state: Any = None) -> None:
        super().__init__(device)
        dataset = Tiles(folder)
        self._num_seen = state or 0
        self._loader = DataLoader(
            dataset,
            batch_size=BATCH,
            sampler=SeededOrder(len(dataset), self._num_seen * BATCH),
            num_workers=num_readers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )

    def integers(self) -> Iterator[Batch]:
        """Yield the batches of one pass over the loader."""
        for tiles, masks in self._loader:
            self._num_seen += 1
            yield tiles.to(self.device), masks.to(self.device)

    def state(self) -> Any:
        """Return how many batches of this epoch were seen."""
        return self._num_seen
