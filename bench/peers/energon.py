"""megatron-energon: WebDataset tars indexed by `energon prepare`, a crude dataset with a cooker, get_savable_loader.

Settings from its quickstart and "Save and Restore": `max_samples_per_sequence` is 100 (samples read in a row from one
position), and each rank saves and restores its state. The shuffle buffer of 1,000 is from Megatron Core's guide. It is
divided among the workers here, because each worker has its own. Energon fills it before the first batch.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SampleDecoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)

from peers import wds
from peers.stream import BATCH, Batch, Stream

SHUFFLE_BUFFER, PER_SEQUENCE = 1000, 100


def write(folder: Path, num_tiles: int) -> None:
    """Write the tars of webdataset, and an index."""
    wds.write(folder, num_tiles)
    prepare = [str(Path(sys.executable).with_name("energon")), "prepare", str(folder), "--non-interactive"]
    options = ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--no-progress", "--num-workers", "2"]
    subprocess.run([*prepare, *options], check=True, stdout=subprocess.DEVNULL)


@edataclass
class Tile(Sample):
    """One tile and its mask."""

    tile: torch.Tensor
    mask: torch.Tensor


@stateless
def _cook(sample: dict[str, Any]) -> Tile:
    return Tile(
        **basic_sample_keys(sample),
        tile=torch.as_tensor(sample["bands.npy"]),
        mask=torch.tensor(sample["mask.png"]),
    )


class TileEncoder(DefaultTaskEncoder):  # type: ignore[misc,type-arg]
    """Encoder that decodes arrays and grey images, and stacks them."""

    decoder = SampleDecoder(image_decode="l8")
    cookers = [Cooker(_cook)]  # noqa: RUF012 Energon's own form


class Reader(Stream):
    """Stream of an endless loader."""

    def __init__(self, folder: Path, num_readers: int, device: torch.device, state: Any = None) -> None:
        super().__init__(device)
        dataset = get_train_dataset(
            folder,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=num_readers),
            batch_size=BATCH,
            shuffle_buffer_size=SHUFFLE_BUFFER // num_readers,
            max_samples_per_sequence=PER_SEQUENCE,
            task_encoder=TileEncoder(),
        )
        self._loader = get_savable_loader(dataset)
        if state is not None:
            self._loader.restore_state_rank(state)
        self._batches: Iterator[Any] | None = None
        self._num_batches = len(self._loader)

    def integers(self) -> Iterator[Batch]:
        """Yield as many batches as an epoch has."""
        self._batches = self._batches or iter(self._loader)
        for batch in islice(self._batches, self._num_batches):
            yield batch.tile.to(self.device), batch.mask.to(self.device)

    def state(self) -> Any:
        """Return the state of the loader."""
        return self._loader.save_state_rank()
