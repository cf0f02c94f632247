"""The contact sheet of a data set: some tiles of every split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from msvae.pack.data_set import DataSet
from msvae.pack.output import SHEET_NAME
from msvae.pack.shard_job import read_samples
from msvae.pack.split import SplitTiles
from msvae.pack.tiling import Tile
from msvae.pack.work import WorkFolder
from msvae.report.contact_sheet import LabelledTile, contact_sheet
from msvae.shards.overview import places_in_even_steps, reflectance_tiles
from msvae.shards.reader import ShardReader
from msvae.wording import counted

TILES_A_SPLIT = 18
Sections = Mapping[str, Sequence[Tile]]
"""Tiles to draw below each title."""


def save_contact_sheet(path: Path, readers: Mapping[str, ShardReader]) -> None:
    """Draw 18 tiles of each split, in even steps, with its name.

    Raises: ValueError naming a tile that cannot be read.
    """
    sections = [
        (_title(name, sum(reader.samples_per_shard)), reflectance_tiles(reader, TILES_A_SPLIT))
        for name, reader in readers.items()
    ]
    bands = next(iter(readers.values())).manifest.bands
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contact_sheet(sections, bands))
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); choose a writable place") from error


def plan_sheet(splits: SplitTiles) -> Sections:
    """The tiles that `save_contact_sheet` would draw of the shards."""
    return {
        _title(name, len(tiles)): [tiles[row] for _, row in places_in_even_steps([len(tiles)], TILES_A_SPLIT)]
        for name, tiles in splits.tiles.items()
        if tiles
    }


def draw_sheet(data_set: DataSet, work: WorkFolder, sections: Sections, count: Callable[[int], None]) -> None:
    """Draw the sheet of a data set from its images, while others write the shards."""
    tiles = [(title, _reflectance_tiles(data_set, of_split)) for title, of_split in sections.items()]
    (work.data / SHEET_NAME).write_bytes(contact_sheet(tiles, data_set.layout.bands))


def _title(split: str, num_tiles: int) -> str:
    return f"{split}: {counted(num_tiles, 'tile')}"


def _reflectance_tiles(data_set: DataSet, tiles: Sequence[Tile]) -> Iterator[LabelledTile]:
    layout = data_set.layout
    scale, offset = (np.array(values, np.float32)[:, None, None] for values in (layout.scale, layout.offset))
    for key, stored_CHW, leaf_HW, _ in read_samples(data_set, tiles, [""] * len(tiles)):
        yield key, stored_CHW * scale + offset, leaf_HW
