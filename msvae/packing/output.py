"""The output folder: what may be in it before packing, and its contact sheet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from msvae.messages import counted
from msvae.packing.options import PackOptions
from msvae.report.contact_sheet import contact_sheet
from msvae.shards.manifest import MANIFEST_NAME, Manifest
from msvae.shards.reader import ShardReader
from msvae.shards.splits import SPLITS, reflectance_tiles

PACKED = re.compile(r"leaf-\d{6,}\.(tar|index\.json)")
SHEET_NAME = "contact-sheet.png"
TILES_PER_SPLIT = 18
"""Tiles of each split in the contact sheet."""


def check_output(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Check that the dataset can be put in place of `out` and that this destroys nothing else.

    Raises: ValueError if `out` is a file or a mount point, holds data without `overwrite`, holds anything other than a
    packed dataset, or holds one of the inputs.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.is_mount():
        raise ValueError(f"--out {out} is a mount point and cannot be replaced in one step; name a folder inside it")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not names:
        return
    if not overwrite:
        raise ValueError(f"--out {out} exists and is not empty; name another folder or give --overwrite")
    foreign = [name for name in names if name not in (*SPLITS, SHEET_NAME)] + [
        f"{split}/{path.name}"
        for split in SPLITS
        for path in sorted((out / split).glob("*"))
        if path.name != MANIFEST_NAME and not PACKED.fullmatch(path.name)
    ]
    if foreign or any(path.is_relative_to(out) for path in inputs):
        raise ValueError(
            f"--overwrite would delete {', '.join(foreign[:5]) or 'the images'} in {out}, which is not a packed "
            "dataset; name another --out"
        )


def is_merged(out: Path, options: PackOptions) -> bool:
    """Return True if `out` holds a dataset that these options may have made, according to its manifest."""
    try:
        manifest = Manifest.load(out / SPLITS[0])
    except ValueError:
        return False
    return (manifest.tile_px, manifest.compression) == (options.tile_px, options.compression)


def save_contact_sheet(path: Path, readers: Mapping[str, ShardReader]) -> None:
    """Draw 18 tiles of each split, in even steps, under the name of the split.

    Raises: ValueError if a tile cannot be read or the file cannot be written.
    """
    sections = [
        (f"{name}: {counted(sum(reader.samples_per_shard), 'tile')}", reflectance_tiles(reader, TILES_PER_SPLIT))
        for name, reader in readers.items()
    ]
    bands = next(iter(readers.values())).manifest.bands
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contact_sheet(sections, bands))
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); choose a writable folder") from error
