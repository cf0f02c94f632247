"""The passes over the images before shards are written: masks of whole images, leaf pixels per cell, tiles.

Results are kept in files of the work folder, so that every result is computed once, by any process.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msvae.files import replace_file, write_text
from msvae.packing.tiling import Tile, TilePositions, count_covered_pixels, grid_tiles, leaf_tiles, tile_positions
from msvae.packing.workers import OnTiles, PackJob
from msvae.rasters.masks import no_mask_error
from msvae.rasters.whole_image import num_passes, prepare_mask
from msvae.work_folder import WorkFolder

MASKS, SURVEY = "masks", "survey"
"""Folders inside the work folder."""
TOO_SMALL = "image smaller than a tile"
STRIP_PIXELS = 2**25
"""Pixels of a large image that one task counts."""
MIN_READ_PX = 256
"""Smallest side of the windows that are read. Smaller ones take longer for the same pixels."""


@dataclass(frozen=True)
class Strip:
    """Rows of cells of one image, from `first` to before `last`."""

    image: int
    first: int
    last: int


@dataclass
class Survey:
    """Tiles and numbers of leaf pixels of one image, or of all images."""

    tiles: list[Tile] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped tiles by reason."""
    leaf_pixels: int = 0
    covered_pixels: int = 0
    """Leaf pixels in at least one tile."""

    def add(self, other: Survey) -> None:
        """Add the results of another image."""
        self.tiles += other.tiles
        self.dropped += other.dropped
        self.leaf_pixels += other.leaf_pixels
        self.covered_pixels += other.covered_pixels


def strips_of(job: PackJob, index: int) -> list[Strip]:
    """Return the strips in which the leaf pixels of an image are counted. An image smaller than a tile has none."""
    positions = _positions(job, index)
    if not len(positions):
        return []
    read_px = _read_px(positions)
    strip_px = max(1, STRIP_PIXELS // (positions.width * read_px)) * read_px
    borders = np.searchsorted(positions.row_edges, np.arange(0, positions.height, strip_px))
    borders = np.unique([*borders, len(positions.row_edges) - 1])
    return [Strip(index, int(first), int(last)) for first, last in pairwise(borders)]


def num_tiles_in(job: PackJob, strip: Strip) -> int:
    """Return the size of a strip in tiles, for the progress bar."""
    positions = _positions(job, strip.image)
    num_in_image = (positions.height // positions.tile_px) * (positions.width // positions.tile_px)
    begin, end = (
        int(positions.row_edges[edge]) * num_in_image // positions.height for edge in (strip.first, strip.last)
    )
    return end - begin


def prepare_image(job: PackJob, index: int, on_tiles: OnTiles) -> None:
    """Prepare a mask that depends on its whole image, and keep it in the work folder.

    Raises: ValueError if a file is damaged, or the image has no threshold.
    """
    image, num_reported = job.image_set.images[index], 0
    num_tiles = sum(num_tiles_in(job, strip) for strip in strips_of(job, index))
    left_px = all_px = num_passes(job.image_set) * image.height * image.width

    def report(num_pixels: int) -> None:
        nonlocal left_px, num_reported
        left_px = max(0, left_px - num_pixels)
        num_done = num_tiles * (all_px - left_px) // all_px
        on_tiles(num_done - num_reported)
        num_reported = num_done

    prepare_mask(job.image_set, job.work.path / MASKS, index, report)
    report(left_px)


def count_strip(job: PackJob, strip: Strip, on_tiles: OnTiles) -> None:
    """Count the leaf pixels of a strip and keep them in the work folder."""
    file = _cells_file(job.work, strip)
    if not file.is_file():
        cells_RC, has_background = _count_cells(job, strip)
        with replace_file(file) as partial:
            np.savez_compressed(partial, cells=cells_RC, background_seen=has_background)
    on_tiles(num_tiles_in(job, strip))


def find_tiles(job: PackJob, index: int, on_tiles: OnTiles) -> None:
    """Choose the tiles of an image and keep them in the work folder.

    Raises: ValueError if the image needs background to prove that it has a mask, and has none.
    """
    strips = strips_of(job, index)
    if len(strips) == 1:  # larger images were reported by count_strip
        on_tiles(num_tiles_in(job, strips[0]))
    if _tiles_file(job.work, index).is_file():
        return
    survey = Survey(dropped=Counter({TOO_SMALL: 1}))
    if strips:
        counts = [_load_cells(job, strip) for strip in strips]
        image = job.image_set.images[index]
        if image.mask.must_have_background and not any(has_background for _, has_background in counts):
            raise no_mask_error(image.source)
        survey = _choose_tiles(job, index, np.concatenate([cells_RC for cells_RC, _ in counts]))
    record = {
        "tiles": [[tile.row, tile.col, tile.leaf_pixels] for tile in survey.tiles],
        "dropped": dict(survey.dropped),
        "leaf_pixels": survey.leaf_pixels,
        "covered_pixels": survey.covered_pixels,
    }
    write_text(_tiles_file(job.work, index), json.dumps(record))


def load_survey(job: PackJob) -> Survey:
    """Return the results of all images, in their order.

    Raises: ValueError if no tile holds enough leaf.
    """
    survey = Survey()
    for index in range(len(job.image_set.images)):
        record = json.loads(_tiles_file(job.work, index).read_text())
        tiles = [Tile(index, *numbers) for numbers in record.pop("tiles")]
        survey.add(Survey(tiles, Counter(record.pop("dropped")), **record))
    if not survey.tiles:
        reasons = ", ".join(f"{count} {reason}" for reason, count in survey.dropped.items())
        raise ValueError(
            f"no tile left to train on: {len(job.image_set.images)} images, dropped {reasons or 'nothing'}; "
            "lower --min-coverage or --tile, or choose another --mask"
        )
    return survey


def _positions(job: PackJob, index: int) -> TilePositions:
    image = job.image_set.images[index]
    return tile_positions(image.height, image.width, job.options)


def _cells_file(work: WorkFolder, strip: Strip) -> Path:
    return work.path / SURVEY / f"cells-{strip.image:06d}-{strip.first:06d}.npz"


def _tiles_file(work: WorkFolder, index: int) -> Path:
    return work.path / SURVEY / f"tiles-{index:06d}.json"


def _load_cells(job: PackJob, strip: Strip) -> tuple[NDArray[np.uint32], bool]:
    """Return the cells of a strip, from the work folder if they were counted before."""
    file = _cells_file(job.work, strip)
    if not file.is_file():
        return _count_cells(job, strip)
    with np.load(file) as counted:
        return counted["cells"], bool(counted["background_seen"])


def _choose_tiles(job: PackJob, index: int, cells_RC: NDArray[np.integer]) -> Survey:
    positions, options = _positions(job, index), job.options
    survey = Survey(leaf_pixels=int(cells_RC.sum()))
    if options.tiling == "grid":
        survey.tiles, survey.dropped = grid_tiles(index, positions, cells_RC, options.min_coverage)
    else:
        survey.tiles = leaf_tiles(index, positions, cells_RC, options.min_coverage)
    survey.covered_pixels = count_covered_pixels(positions, cells_RC, survey.tiles)
    return survey


def _read_px(positions: TilePositions) -> int:
    return min(max(positions.tile_px, MIN_READ_PX), positions.height, positions.width)


def _count_cells(job: PackJob, strip: Strip) -> tuple[NDArray[np.uint32], bool]:
    """Return the leaf pixels of each cell of a strip, and True if any pixel is background."""
    positions = _positions(job, strip.image)
    read_px = _read_px(positions)
    row_edges, col_edges = positions.row_edges[strip.first : strip.last + 1], positions.col_edges
    cells_RC = np.zeros((len(row_edges) - 1, len(col_edges) - 1), np.uint32)
    has_background = False
    with job.image_set.open(strip.image) as image:
        for row, end_row in _steps(int(row_edges[0]), int(row_edges[-1]), read_px):
            for col, end_col in _steps(0, positions.width, read_px):
                # A window that would reach beyond the image starts earlier; its first pixels are not counted again.
                from_row, from_col = min(row, positions.height - read_px), min(col, positions.width - read_px)
                leaf_HW = image.read_leaf(from_row, from_col, read_px, read_px)
                leaf_HW = leaf_HW[row - from_row : end_row - from_row, col - from_col : end_col - from_col]
                has_background = has_background or not leaf_HW.all()
                first_row, at_rows = _cells_from(row_edges, row, end_row)
                first_col, at_cols = _cells_from(col_edges, col, end_col)
                counts_RC = np.add.reduceat(leaf_HW.view(np.uint8), at_cols, axis=1, dtype=np.uint32)
                counts_RC = np.add.reduceat(counts_RC, at_rows, axis=0)
                rows, cols = counts_RC.shape
                cells_RC[first_row : first_row + rows, first_col : first_col + cols] += counts_RC
        image.check_reflectance()
    return cells_RC, has_background


def _steps(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, end)) for start in range(begin, end, step))


def _cells_from(edges: NDArray[np.int64], begin: int, end: int) -> tuple[int, NDArray[np.int64]]:
    """Return the first cell that a window touches, and the index in the window at which each cell begins."""
    inside = edges[(edges > begin) & (edges < end)] - begin
    return int(np.searchsorted(edges, begin, "right")) - 1, np.concatenate([[0], inside])
