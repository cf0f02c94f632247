"""The contact sheet of a data set: some tiles of every split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msvae.messages import counted
from msvae.report.contact_sheet import contact_sheet
from msvae.shards.reader import ShardReader
from msvae.shards.splits import reflectance_tiles

SHEET_NAME = "contact-sheet.png"
TILES_A_SPLIT = 18


def save_contact_sheet(path: Path, readers: Mapping[str, ShardReader]) -> None:
    """Draw 18 tiles of each split, in even steps, with its name.

    Raises: ValueError naming a tile that cannot be read.
    """
    sections = [
        (f"{name}: {counted(sum(reader.samples_per_shard), 'tile')}", reflectance_tiles(reader, TILES_A_SPLIT))
        for name, reader in readers.items()
    ]
    bands = next(iter(readers.values())).manifest.bands
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contact_sheet(sections, bands))
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); choose a writable place") from error
