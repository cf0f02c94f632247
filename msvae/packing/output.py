"""A folder that appears complete or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from msvae.packing.options import SPLITS, PackOptions
from msvae.packing.sheet import SHEET_NAME
from msvae.shards.manifest import MANIFEST_NAME, Manifest

PACKED = re.compile(r"leaf-\d{6,}\.(tar|index\.json)")


def check_output(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse an output that could not be put in place or would destroy something.

    Raises: ValueError when `out` is a file or a mount point, holds data and may not be overwritten, holds anything but
    a packed data set, or holds one of the inputs.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.is_mount():
        raise ValueError(f"--out {out} is a mount point and cannot be replaced in one step; name a folder inside it")
    inside = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not inside:
        return
    if not overwrite:
        raise ValueError(f"--out {out} exists and is not empty; name another folder or give --overwrite")
    foreign = [name for name in inside if name not in (*SPLITS, SHEET_NAME)] + [
        f"{split}/{path.name}"
        for split in SPLITS
        for path in sorted((out / split).glob("*"))
        if path.name != MANIFEST_NAME and not PACKED.fullmatch(path.name)
    ]
    if foreign or any(path.is_relative_to(out) for path in inputs):
        raise ValueError(
            f"--overwrite would delete {', '.join(foreign[:5]) or 'the images'} in {out}, which is no packed data; "
            "name another --out"
        )


def is_merged(out: Path, options: PackOptions) -> bool:
    """Whether the data set whose parts these options make is there already, as far as its manifest tells."""
    try:
        manifest = Manifest.load(out / SPLITS[0])
    except ValueError:
        return False
    return (manifest.tile_px, manifest.compression) == (options.tile_px, options.compression)
