"""Leaf pixels per tile of both tilings of a field with one file a band.

python bench/tilings.py FIELD --band-files blue.tif,… --wavelengths 475,… [--mask 'ndvi>0.10'] [--tile 128]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from msvae.pack.job import pack
from msvae.pack.options import PackOptions


def main() -> None:
    """Pack the field with each, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("field", type=Path)
    parser.add_argument("--band-files", required=True)
    parser.add_argument("--wavelengths", required=True)
    parser.add_argument("--mask", default="ndvi>0.10")
    parser.add_argument("--tile", type=int, default=128)
    given = parser.parse_args()
    options = PackOptions(
        band_files=tuple(given.band_files.split(",")),
        wavelengths_nm=tuple(map(float, given.wavelengths.split(","))),
        mask=given.mask,
        tile_px=given.tile,
        split=(1, 0, 0),
        num_workers=None,
    )
    tilings = {
        "grid": options,
        "leaf": replace(options, tiling="leaf"),
        "grid, all leaf": replace(options, min_coverage=0.01),
        "leaf, all leaf": replace(options, tiling="leaf", min_coverage=0.01),
    }
    leaf_pixels_a_tile: dict[str, float] = {}
    for name, chosen in tilings.items():
        with tempfile.TemporaryDirectory() as folder:
            summary = pack([given.field], Path(folder) / "out", chosen)
        num_tiles = sum(summary.tiles.values())
        leaf_pixels_a_tile[name] = summary.leaf_pixels_covered / num_tiles
        covered = summary.leaf_pixels_covered / summary.leaf_pixels_in_images
        print(
            f"{name}: {num_tiles} tiles, {covered:.1%} of the leaf, "
            f"{leaf_pixels_a_tile[name]:,.0f} different leaf pixels a tile, "
            f"{leaf_pixels_a_tile[name] / leaf_pixels_a_tile['grid']:.2f}x those of the grid"
        )


if __name__ == "__main__":
    main()
