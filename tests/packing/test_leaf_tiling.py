"""Leaf tiling covers the leaves with few tiles, and a stride makes tiles of the grid overlap."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.draw import ellipse

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.packing.tiling import MAX_CELLS, leaf_cell_px, leaf_tiles, tile_positions

TRAIN_ONLY = {"split": (1, 0, 0), "min_coverage": 0.1}


def scattered_leaves(height: int, width: int, num_leaves: int, radius_px: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    for _ in range(num_leaves):
        row, col = rng.integers(0, height), rng.integers(0, width)
        radii = rng.uniform(0.5, 1, 2) * radius_px
        mask[ellipse(row, col, *radii, shape=mask.shape, rotation=rng.uniform(0, np.pi))] = True
    return mask


def windows(read_tars, folder):
    return [tuple(sample["json"]["window"]) for sample in read_tars(folder).values()]


def share_covered(mask: np.ndarray, tiles: list[tuple[int, ...]]) -> float:
    covered = np.zeros_like(mask)
    for row, col, height, width in tiles:
        covered[row : row + height, col : col + width] = True
    return mask[covered].sum() / mask.sum()


@pytest.mark.parametrize("shape", [(512, 512), (500, 333)])
@pytest.mark.parametrize("seed", range(3))
def test_leaf_tiling_covers_99_percent_with_far_fewer_tiles_than_the_grid(
    tmp_path, write_raster, read_tars, shape, seed
):
    mask = scattered_leaves(*shape, num_leaves=14, radius_px=28, seed=seed)
    image = write_raster(tmp_path / "leaf.tif", np.ones((5, *shape), np.uint8), mask=mask)
    leaf = pack([image], tmp_path / "leaf", PackOptions(tile_px=64, tiling="leaf", scale=1, **TRAIN_ONLY))
    tiles = windows(read_tars, tmp_path / "leaf" / "train")
    rows, cols = (range(0, length, 64) for length in shape)
    touched = sum(mask[row : row + 64, col : col + 64].any() for row in rows for col in cols)
    assert share_covered(mask, tiles) >= 0.985  # 99 % of what tiles of 10 % coverage can hold
    assert len(tiles) <= 0.75 * touched
    assert leaf.leaf_pixels_in_images == mask.sum()
    assert leaf.leaf_pixels_covered == round(share_covered(mask, tiles) * mask.sum())
    times = np.zeros(shape, int)
    for row, col, height, width in tiles:
        times[row : row + height, col : col + width] += 1
    assert leaf.leaf_pixels_repeated == (times - 1)[mask & (times > 0)].sum()
    for row, col, height, width in tiles:
        assert 0 <= row <= shape[0] - height and 0 <= col <= shape[1] - width
        assert mask[row : row + height, col : col + width].mean() >= 0.1


def test_leaf_at_the_far_border_of_an_odd_image_is_covered(tmp_path, write_raster, read_tars):
    mask = np.zeros((101, 91), bool)
    mask[90:, 80:] = True
    image = write_raster(tmp_path / "leaf.tif", np.ones((5, 101, 91), np.uint8), mask=mask)
    options = PackOptions(tile_px=16, tiling="leaf", scale=1, **TRAIN_ONLY)
    pack([image], tmp_path / "out", options)
    assert windows(read_tars, tmp_path / "out" / "train") == [(85, 75, 16, 16)]


def test_leaf_too_scattered_for_min_coverage_is_left_out_and_reported(tmp_path, write_raster, read_tars):
    mask = np.zeros((128, 128), bool)
    mask[8:40, 8:40] = True
    mask[120:122, 120:122] = True
    image = write_raster(tmp_path / "leaf.tif", np.ones((5, 128, 128), np.uint8), mask=mask)
    summary = pack([image], tmp_path / "out", PackOptions(tile_px=32, tiling="leaf", scale=1, **TRAIN_ONLY))
    assert windows(read_tars, tmp_path / "out" / "train") == [(8, 8, 32, 32)]
    assert (summary.leaf_pixels_in_images, summary.leaf_pixels_covered) == (32 * 32 + 4, 32 * 32)


def test_coverage_below_99_percent_is_reported_with_the_option_to_change(tmp_path, write_raster):
    mask = np.zeros((128, 128), bool)
    mask[8:40, 8:40] = True
    mask[100:106, 100:106] = True
    image = write_raster(tmp_path / "leaf.tif", np.ones((5, 128, 128), np.uint8), mask=mask)
    options = PackOptions(tile_px=32, tiling="leaf", scale=1, **TRAIN_ONLY)
    thin = pack([image], tmp_path / "thin", options)
    (note,) = [note for note in thin.notices if "of the leaf" in note]
    assert "96.6% of the leaf; the rest is too scattered for --min-coverage 0.1" in note
    full = pack([image], tmp_path / "full", options.model_copy(update={"min_coverage": 0.01}))
    assert full.leaf_pixels_covered == mask.sum()
    assert not [note for note in full.notices if "of the leaf" in note]


def test_tiles_over_dense_leaf_hardly_overlap():
    mask_cells = np.full((64, 64), 64, np.uint32)
    where = tile_positions(512, 512, PackOptions(tile_px=64, tiling="leaf"))
    assert len(leaf_tiles(0, where, mask_cells, 0.1)) <= 66  # 64 without any overlap


def test_the_number_of_cells_of_a_huge_image_is_bounded():
    for side_px in (1_000, 50_000, 200_000):
        cell_px = leaf_cell_px(side_px, side_px, 256)
        assert (side_px / cell_px) ** 2 <= 2.5 * MAX_CELLS


@pytest.mark.parametrize(("stride", "num_tiles"), [(16, 16), (8, 49), (24, 9)])
def test_stride_sets_the_distance_of_tiles_in_the_grid(tmp_path, leaf_image, read_tars, stride, num_tiles):
    options = PackOptions(tile_px=16, stride_px=stride, split=(1, 0, 0))
    pack([leaf_image(tmp_path / "field.tif")], tmp_path / "out", options)
    samples = read_tars(tmp_path / "out" / "train")
    starts = {sample["json"]["window"][0] for sample in samples.values()}
    assert starts == set(range(0, 64 - 15, stride)) and len(samples) == num_tiles
    for sample in samples.values():
        assert sample["json"]["coverage"] == sample["mask.png"].mean()
