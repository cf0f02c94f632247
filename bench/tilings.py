"""Compare leaf pixels per tile of both tilings of a field, and the number of tiles to a lower bound.

The field has one file per band.

python bench/tilings.py FIELD --band-files blue.tif,… --wavelengths 475,… [--mask 'ndvi>0.10'] [--tile 128]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, hstack, vstack

from msvae.packing import survey
from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.packing.tiling import TARGET_SHARE, LeafCover, TilePositions


def main() -> None:
    """Pack the field with each tiling, and print the comparison."""
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
        num_workers=1,
    )
    tilings = {
        "grid": options,
        "leaf": options.model_copy(update={"tiling": "leaf"}),
        "grid, all leaf": options.model_copy(update={"min_coverage": 0.01}),
        "leaf, all leaf": options.model_copy(update={"tiling": "leaf", "min_coverage": 0.01}),
    }
    leaf_pixels_per_tile: dict[str, float] = {}
    for name, chosen in tilings.items():
        with tempfile.TemporaryDirectory() as folder, leaf_maps() as maps:
            summary = pack([given.field], Path(folder) / "out", chosen)
        num_tiles = sum(summary.tiles.values())
        leaf_pixels_per_tile[name] = summary.leaf_pixels_covered / num_tiles
        covered = summary.leaf_pixels_covered / summary.leaf_pixels_in_images
        print(
            f"{name}: {num_tiles} tiles, {covered:.1%} of the leaf, "
            f"{leaf_pixels_per_tile[name]:,.0f} different leaf pixels per tile, "
            f"{leaf_pixels_per_tile[name] / leaf_pixels_per_tile['grid']:.2f}x the grid"
        )
    ((positions, cells_RC, min_coverage),) = maps
    bound = lower_bound(positions, cells_RC, min_coverage)
    print(f"lower bound for {TARGET_SHARE:.0%} of all leaf: {bound} tiles")


@contextmanager
def leaf_maps() -> Iterator[list[tuple[TilePositions, NDArray[Any], float]]]:
    """Collect the arguments of leaf tiling for every image."""
    maps: list[tuple[TilePositions, NDArray[Any], float]] = []
    leaf_tiles = survey.leaf_tiles

    def record(image: int, *given: Any) -> Any:
        maps.append(given)
        return leaf_tiles(image, *given)

    survey.leaf_tiles = record
    try:
        yield maps
    finally:
        survey.leaf_tiles = leaf_tiles


def lower_bound(positions: TilePositions, cells_RC: NDArray[Any], min_coverage: float) -> int:
    """Return a lower bound of the number of tiles that leaf tiling needs, from a linear program.

    Its variables are the fraction of a tile at each allowed position, and the covered fraction of each cell with leaf.
    """
    cover = LeafCover(positions, cells_RC, min_coverage)
    leaf_cells = np.flatnonzero(cells_RC)
    row_of_cell = np.full(cells_RC.size, -1)
    row_of_cell[leaf_cells] = np.arange(len(leaf_cells))
    numbers_RC = row_of_cell.reshape(cells_RC.shape)
    inside = [numbers_RC[cover.cells_of(position)] for position in cover.allowed()]
    inside = [cells[cells >= 0] for cells in inside]
    columns = np.repeat(np.arange(len(inside)), [len(cells) for cells in inside])
    covers = csr_array(
        (np.ones(len(columns)), (np.concatenate(inside), columns)), shape=(len(leaf_cells), len(inside))
    )
    leaf = cells_RC.ravel()[leaf_cells].astype(np.float64)
    target = np.zeros(len(inside) + len(leaf_cells))
    target[len(inside) :] = -leaf / cover.holdable_pixels
    solved = linprog(
        np.repeat([1.0, 0.0], [len(inside), len(leaf_cells)]),
        A_ub=vstack([hstack([-covers, eye_array(len(leaf_cells))]), csr_array(target[None])]),
        b_ub=np.append(np.zeros(len(leaf_cells)), -TARGET_SHARE),
        bounds=(0, 1),
        method="highs-ipm",
    )
    return math.ceil(solved.fun - 1e-6)


if __name__ == "__main__":
    main()
