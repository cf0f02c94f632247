"""The first pass: leaf pixels counted cell by cell, and from them the tiles of every image.

What has been found lies in files of the work folder, so that it is found once, by whichever process.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from msvae.files import replace_file, write_text
from msvae.packing.placement import leaf_tiles
from msvae.packing.tiling import Places, Tile, covered_pixels, grid_tiles, places
from msvae.rasters.images import DataSet
from msvae.rasters.masks import no_mask_error
from msvae.work_folder import WorkFolder

TOO_SMALL = "image smaller than a tile"
BAND_PIXELS = 2**25
"""Of the rows of a large image that one process counts at once."""
MIN_READ_PX = 256
"""Side of the windows that are read: small ones take longer for the same pixels."""


@dataclass(frozen=True)
class Band:
    """Rows of cells of one image, from `first` to before `last`."""

    image: int
    first: int
    last: int


@dataclass
class Survey:
    """What was found in an image, or in all of them."""

    tiles: list[Tile] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    leaf_pixels: int = 0
    covered_pixels: int = 0
    """Leaf pixels in at least one tile."""

    def add(self, other: Survey) -> None:
        """Take in what was found in another image."""
        self.tiles += other.tiles
        self.dropped += other.dropped
        self.leaf_pixels += other.leaf_pixels
        self.covered_pixels += other.covered_pixels


def places_in(data_set: DataSet, index: int) -> Places:
    """Where tiles may lie in an image."""
    image = data_set.images[index]
    return places(image.height, image.width, data_set.options)


def bands_of(data_set: DataSet, index: int) -> list[Band]:
    """The rows of an image in parts that are read one after the other."""
    where = places_in(data_set, index)
    if not len(where):
        return []
    read_px = _read_px(where)
    band_px = max(1, BAND_PIXELS // (where.width * read_px)) * read_px
    borders = np.searchsorted(where.row_edges, np.arange(0, where.height, band_px))
    borders = np.unique([*borders, len(where.row_edges) - 1])
    return [Band(index, int(first), int(last)) for first, last in pairwise(borders)]


def num_tiles_of(data_set: DataSet, band: Band) -> int:
    """For progress: tiles' worth of pixels in a band."""
    where = places_in(data_set, band.image)
    in_image = (where.height // where.tile_px) * (where.width // where.tile_px)
    begin, end = (int(where.row_edges[edge]) * in_image // where.height for edge in (band.first, band.last))
    return end - begin


def count_band(data_set: DataSet, work: WorkFolder, band: Band, count: Callable[[int], None]) -> None:
    """Count the leaf pixels of a band and keep them in the work folder."""
    if not work.cells(band.image, band.first).is_file():
        cells_RC, background_seen = _count_cells(data_set, band)
        with replace_file(work.cells(band.image, band.first)) as partial:
            np.savez_compressed(partial, cells=cells_RC, background_seen=background_seen)
    count(num_tiles_of(data_set, band))


def find_tiles(data_set: DataSet, work: WorkFolder, index: int, count: Callable[[int], None]) -> None:
    """Choose the tiles of an image and keep them in the work folder.

    Raises: ValueError when nothing told leaf from background in the image.
    """
    bands = bands_of(data_set, index)
    if len(bands) == 1:
        count(num_tiles_of(data_set, bands[0]))
    if work.tiles(index).is_file():
        return
    survey = Survey(dropped=Counter({TOO_SMALL: 1}))
    if bands:
        counted = [_counted(data_set, work, band) for band in bands]
        image = data_set.images[index]
        if image.mask.must_see_background and not any(background_seen for _, background_seen in counted):
            raise no_mask_error(image.source)
        survey = _choose_tiles(data_set, index, np.concatenate([cells_RC for cells_RC, _ in counted]))
    record = {
        "tiles": [[tile.row, tile.col, tile.leaf_pixels] for tile in survey.tiles],
        "dropped": dict(survey.dropped),
        "leaf_pixels": survey.leaf_pixels,
        "covered_pixels": survey.covered_pixels,
    }
    write_text(work.tiles(index), json.dumps(record))


def _counted(data_set: DataSet, work: WorkFolder, band: Band) -> tuple[NDArray[np.uint32], bool]:
    """The cells of a band, from the work folder if they were counted before."""
    kept = work.cells(band.image, band.first)
    if not kept.is_file():
        return _count_cells(data_set, band)
    with np.load(kept) as counted:
        return counted["cells"], bool(counted["background_seen"])


def load_survey(data_set: DataSet, work: WorkFolder) -> Survey:
    """What was found in all images, in their order.

    Raises: ValueError when no tile holds enough leaf.
    """
    survey = Survey()
    for index in range(len(data_set.images)):
        record = json.loads(work.tiles(index).read_text())
        tiles = [Tile(index, *numbers) for numbers in record.pop("tiles")]
        survey.add(Survey(tiles, Counter(record.pop("dropped")), **record))
    if not survey.tiles:
        reasons = ", ".join(f"{count} {reason}" for reason, count in survey.dropped.items())
        raise ValueError(
            f"no tile left to train on: {len(data_set.images)} images, dropped {reasons or 'nothing'}; "
            "lower --min-coverage or --tile, or choose another --mask"
        )
    return survey


def _choose_tiles(data_set: DataSet, index: int, cells_RC: NDArray[np.integer]) -> Survey:
    where, options = places_in(data_set, index), data_set.options
    survey = Survey(leaf_pixels=int(cells_RC.sum()))
    if options.tiling == "grid":
        survey.tiles, survey.dropped = grid_tiles(index, where, cells_RC, options.min_coverage)
    else:
        survey.tiles = leaf_tiles(index, where, cells_RC, options.min_coverage)
    survey.covered_pixels = covered_pixels(where, cells_RC, survey.tiles)
    return survey


def _read_px(where: Places) -> int:
    return min(max(where.tile_px, MIN_READ_PX), where.height, where.width)


def _count_cells(data_set: DataSet, band: Band) -> tuple[NDArray[np.uint32], bool]:
    """Leaf pixels of each cell of a band, and whether any background was seen."""
    where = places_in(data_set, band.image)
    row_edges, col_edges = where.row_edges[band.first : band.last + 1], where.col_edges
    cells_RC = np.zeros((len(row_edges) - 1, len(col_edges) - 1), np.uint32)
    background_seen = False
    with data_set.open(band.image) as opened:
        for row, end_row in _steps(int(row_edges[0]), int(row_edges[-1]), _read_px(where)):
            for col, end_col in _steps(0, where.width, _read_px(where)):
                # A window that would reach beyond the image starts earlier; its first pixels are not counted again.
                from_row = min(row, where.height - _read_px(where))
                from_col = min(col, where.width - _read_px(where))
                leaf_HW = opened.read_leaf(from_row, from_col, _read_px(where), _read_px(where))
                leaf_HW = leaf_HW[row - from_row : end_row - from_row, col - from_col : end_col - from_col]
                background_seen = background_seen or not leaf_HW.all()
                first_row, at_rows = _cells_from(row_edges, row, end_row)
                first_col, at_cols = _cells_from(col_edges, col, end_col)
                counts_RC = np.add.reduceat(leaf_HW.view(np.uint8), at_cols, axis=1, dtype=np.uint32)
                counts_RC = np.add.reduceat(counts_RC, at_rows, axis=0)
                rows, cols = counts_RC.shape
                cells_RC[first_row : first_row + rows, first_col : first_col + cols] += counts_RC
        opened.check_reflectance()
    return cells_RC, background_seen


def _steps(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, end)) for start in range(begin, end, step))


def _cells_from(edges: NDArray[np.int64], begin: int, end: int) -> tuple[int, NDArray[np.int64]]:
    """The first cell that a window touches, and where in the window each cell begins."""
    inside = edges[(edges > begin) & (edges < end)] - begin
    return int(np.searchsorted(edges, begin, "right")) - 1, np.concatenate([[0], inside])
