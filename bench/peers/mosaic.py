"""mosaicml-streaming: MDSWriter, and StreamingDataset with StreamingDataLoader on a local folder.

Settings from its documentation: the dataset receives `batch_size`, too; shuffling is py1e (the default);
`state_dict` resumes. It imports torchvision, and requires numpy < 2.2 and transformers < 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from peers.stream import BATCH, SHARDS, TILE_SHAPE, Batch, Stream, decode_mask, encode_mask, make_tile


def write(folder: Path, num_tiles: int) -> None:
    """Write 16 shards, limited by their size in bytes."""
    columns = {"tile": "ndarray:uint16:" + ",".join(map(str, TILE_SHAPE)), "mask": "bytes"}
    tile_bytes = make_tile(0)[0].nbytes + 2048
    with MDSWriter(out=str(folder), columns=columns, size_limit=num_tiles // SHARDS * tile_bytes) as writer:
        for row in range(num_tiles):
            tile, leaf_mask = make_tile(row)
            writer.write({"tile": tile, "mask": encode_mask(leaf_mask)})


class Tiles(StreamingDataset):  # type: ignore[misc]
    """Dataset that decodes the mask."""

    def __getitem__(self, at: int) -> tuple[Any, Any]:
        """Return tile and mask."""
        sample = super().__getitem__(at)
        return sample["tile"], decode_mask(sample["mask"])


class Reader(Stream):
    """Stream of StreamingDataLoader."""

    def __init__(self, folder: Path, num_readers: int, device: torch.device, state: Any = None) -> None:
        super().__init__(device)
        dataset = Tiles(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=num_readers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def integers(self) -> Iterator[Batch]:
        """Yield the batches of one pass over the loader."""
        for tiles, masks in self._loader:
            yield tiles.to(self.device), masks.to(self.device)

    def state(self) -> Any:
        """Return the state of the loader."""
        return self._loader.state_dict()
