"""litdata: `optimize` writes chunks, StreamingDataset with StreamingDataLoader reads them in place.

Facts from its README: shuffle=True on a local path maps chunks into memory in place; `state_dict` of the loader
resumes; `item_shuffle_window` is 256 by default and covers a whole chunk here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import torch

from peers.stream import BATCH, SHARDS, Batch, Stream, decode_mask, encode_mask, make_tile


def write(folder: Path, num_tiles: int) -> None:
    """Write 16 chunks."""
    litdata.optimize(
        _encode, inputs=list(range(num_tiles)), output_dir=str(folder), chunk_size=num_tiles // SHARDS, num_workers=1
    )


def _encode(row: int) -> dict[str, Any]:
    tile, leaf_mask = make_tile(row)
    return {"tile": tile, "mask": encode_mask(leaf_mask)}


def _decode(sample: dict[str, Any]) -> tuple[Any, Any]:
    return sample["tile"], decode_mask(sample["mask"])


class Reader(Stream):
    """Stream of StreamingDataLoader."""

    def __init__(self, folder: Path, num_readers: int, device: torch.device, state: Any = None) -> None:
        super().__init__(device)
        dataset = litdata.StreamingDataset(str(folder), shuffle=True, seed=0, transform=_decode)
        self._loader = litdata.StreamingDataLoader(
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
