"""Masks that depend on the whole image are correct although the image is read in windows."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from msvae.packing import pack as job
from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.rasters import images, whole_image
from msvae.rasters.masks import BitMask
from msvae.rasters.whole_image import eroded, without_small_objects

WHOLE = {"split": (1, 0, 0), "min_coverage": 0.0}


def spirals(height, width, seed=0):
    """Return a mask with objects of every size, many across several strips: noise and a comb."""
    rng = np.random.default_rng(seed)
    leaf = ndimage.gaussian_filter(rng.random((height, width)), 1.2) > 0.5
    leaf |= rng.random((height, width)) > 0.9
    leaf[3 : height - 3, 5:40:4] = True  # prongs, each of which starts as an object of its own
    leaf[height - 5 : height - 3, 5:40] = True
    return leaf


def whole_cleaned(leaf, min_px, erode_px):
    """Return the cleaned mask without strips: one labelling, then erosion pixel by pixel with shifted copies."""
    labels, _ = ndimage.label(leaf)
    kept = leaf & (np.bincount(labels.ravel())[labels] >= min_px)
    for _ in range(erode_px):
        around = np.pad(kept, 1, constant_values=True)
        kept = kept & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return kept


@pytest.mark.parametrize("strip_px", [1, 61 * 3, 61 * 16, 10**6])
@pytest.mark.parametrize("min_px", [2, 7, 60, 10**5])
def test_removed_objects_do_not_depend_on_strips(tmp_path, monkeypatch, strip_px, min_px):
    monkeypatch.setattr(whole_image, "STRIP_PX", strip_px)
    leaf = spirals(97, 61)
    mask = BitMask.write(tmp_path / "leaf", 61, np.array_split(leaf, 5))
    cleaned = np.concatenate(list(without_small_objects(mask, min_px)))
    np.testing.assert_array_equal(cleaned, whole_cleaned(leaf, min_px, 0))


@pytest.mark.parametrize("strip_px", [1, 61 * 3, 10**6])
@pytest.mark.parametrize("erode_px", [1, 2, 5])
def test_eroded_borders_do_not_depend_on_strips(tmp_path, monkeypatch, strip_px, erode_px):
    monkeypatch.setattr(whole_image, "STRIP_PX", strip_px)
    leaf = ndimage.gaussian_filter(np.random.default_rng(1).random((97, 61)), 4) > 0.5
    mask = BitMask.write(tmp_path / "leaf", 61, np.array_split(leaf, 5))
    expected = whole_cleaned(leaf, 0, erode_px)
    assert 0 < expected.sum() < leaf.sum()
    np.testing.assert_array_equal(np.concatenate(list(eroded(mask, erode_px))), expected)


def test_a_mask_without_leaf_stays_empty(tmp_path):
    mask = BitMask.write(tmp_path / "leaf", 9, [np.zeros((7, 9), bool)])
    assert not np.concatenate(list(without_small_objects(mask, 3))).any()


def test_every_window_of_a_bit_mask_equals_the_mask(tmp_path):
    leaf = np.random.default_rng(0).random((19, 37)) < 0.5
    mask = BitMask.write(tmp_path / "leaf", 37, [leaf])
    assert mask.file.stat().st_size == 19 * 5
    for row, col, height, width in [(0, 0, 19, 37), (3, 8, 4, 8), (2, 7, 9, 3), (18, 36, 1, 1), (5, 9, 2, 28)]:
        np.testing.assert_array_equal(mask.read(row, col, height, width), leaf[row : row + height, col : col + width])


def test_cleaning_a_large_mask_needs_memory_of_a_strip(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_image, "STRIP_PX", 2**18)
    block = np.zeros((1024, 4096), bool)
    block[100:900, 100:4000] = True
    mask = BitMask.write(tmp_path / "leaf", 4096, (block for _ in range(16)))
    tracemalloc.start()
    kept = sum(int(strip.sum()) for strip in without_small_objects(mask, 50))
    kept_inside = sum(int(strip.sum()) for strip in eroded(mask, 2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept == 16 * 800 * 3900 and kept_inside == 16 * 796 * 3896
    assert peak < 2**18 * 20 < mask.height * mask.width / 10


@pytest.fixture
def field(tmp_path, write_raster):
    """Write a field with soil, plants, specks and a strip without data. Return file, reflectance, valid pixels."""
    plants = spirals(120, 90, seed=3)
    rng = np.random.default_rng(6)
    values = np.full((5, 120, 90), 2000) + rng.integers(0, 900, (5, 120, 90))
    values[4][plants] += 3000
    values[:, 50:53] = 0
    values = values.astype(np.uint16)
    return write_raster(tmp_path / "field.tif", values, scale=1e-4, nodata=0), values * 1e-4, values[0] > 0


def packed_mask(image, out, read_tars, **options):
    summary = pack([image], out, PackOptions(**(WHOLE | {"tile_px": 16} | options)))
    leaf = np.zeros((112, 80), bool)
    for sample in read_tars(out / "train").values():
        row, col = sample["json"]["window"][:2]
        leaf[row : row + 16, col : col + 16] = sample["mask.png"]
    return leaf, summary


@pytest.mark.parametrize("window_rows", [7, 64, 1000])
def test_otsu_finds_the_threshold_of_the_whole_image_and_reports_it(
    tmp_path, field, read_tars, monkeypatch, window_rows
):
    monkeypatch.setattr(images, "WINDOW_ROWS", window_rows)
    monkeypatch.setattr(images, "WINDOW_BYTES", 1)
    image, (_, _, red, _, nir), valid = field
    with np.errstate(invalid="ignore"):
        ndvi = (nir - red) / (nir + red)
    threshold = threshold_otsu(ndvi[valid])
    leaf, summary = packed_mask(image, tmp_path / "out", read_tars, mask="otsu(ndvi)")
    np.testing.assert_array_equal(leaf, (valid & (ndvi > threshold))[:112, :80])
    assert f"otsu(ndvi): the threshold is {threshold:.4g}" in summary.notices
    assert sorted(path.name for path in tmp_path.iterdir()) == ["field.tif", "out"]


def test_otsu_accepts_any_quantity_and_each_image_has_its_own_threshold(tmp_path, write_raster, read_tars):
    images, expected = [], {}
    for number, level in enumerate((0, 1000)):
        values = np.random.default_rng(number).integers(100, 900, (5, 32, 32), dtype=np.uint16) + np.uint16(level)
        values[1, :16] += 2000
        images.append(write_raster(tmp_path / f"a{number}.tif", values, scale=1e-4))
        quantity = 2 * (values[1] * 1e-4) - values[0] * 1e-4
        expected[f"a{number}_r00000_c00000"] = quantity > threshold_otsu(quantity)
    summary = pack(images, tmp_path / "out", PackOptions(tile_px=32, mask="otsu(2*green - blue)", **WHOLE))
    samples = read_tars(tmp_path / "out" / "train")
    for key, leaf in expected.items():
        np.testing.assert_array_equal(samples[key]["mask.png"], leaf)
    assert any("the threshold is" in notice and "by image" in notice for notice in summary.notices)


def test_a_single_dark_pixel_does_not_move_the_threshold(tmp_path, write_raster, read_tars):
    """Noise of a dark pixel can make nir + red 0.0001 while their difference is 0.04."""
    rng = np.random.default_rng(0)
    plants = np.zeros((32, 32), bool)
    plants[8:24, 8:24] = True
    values = rng.normal(0, 0.004, (5, 32, 32)).astype(np.float32)
    values[:, plants] += np.array([[0.04, 0.1, 0.05, 0.3, 0.45]]).T
    values[:, ~plants] += np.array([[0.1, 0.14, 0.18, 0.2, 0.22]]).T
    values[:, 2, 2] = 0.02
    values[2, 2, 2] = -0.0199
    image = write_raster(tmp_path / "a.tif", values)
    pack([image], tmp_path / "out", PackOptions(tile_px=32, mask="otsu(ndvi)", **WHOLE))
    (sample,) = read_tars(tmp_path / "out" / "train").values()
    plants[2, 2] = True
    np.testing.assert_array_equal(sample["mask.png"], plants)


def test_otsu_may_be_one_of_several_conditions(tmp_path, field, read_tars):
    image, (_, green, red, _, nir), valid = field
    threshold = threshold_otsu((nir - red)[valid])
    mask = "not green > 0.25 and otsu(nir-red) or green < 0.21"
    leaf, summary = packed_mask(image, tmp_path / "out", read_tars, mask=mask)
    with np.errstate(invalid="ignore"):
        expected = valid & (((green <= 0.25) & (nir - red > threshold)) | (green < 0.21))
    assert 0 < expected.sum() < (valid & (nir - red > threshold)).sum()
    np.testing.assert_array_equal(leaf, expected[:112, :80])
    assert f"otsu(nir - red): the threshold is {threshold:.4g}" in summary.notices


def test_an_image_without_contrast_has_no_threshold(tmp_path, write_raster):
    image = write_raster(tmp_path / "flat.tif", np.full((5, 32, 32), 500, np.uint16), scale=1e-4)
    with pytest.raises(ValueError, match=r"flat.tif has the same value 0 everywhere, so otsu\(\) finds no threshold"):
        pack([image], tmp_path / "out", PackOptions(tile_px=32, mask="otsu(ndvi)"))


@pytest.mark.parametrize("rule", ["otsu", "index", "file", "nodata"])
@pytest.mark.parametrize(("min_px", "erode_px"), [(30, 0), (0, 2), (30, 2)])
def test_cleaned_masks_of_tiles_are_windows_of_the_cleaned_image(
    tmp_path, field, read_tars, monkeypatch, rule, min_px, erode_px
):
    monkeypatch.setattr(whole_image, "STRIP_PX", 90 * 11)
    monkeypatch.setattr(images, "WINDOW_ROWS", 13)
    image, (_, green, red, _, nir), valid = field
    options = {"otsu": {"mask": "otsu(nir-red)"}, "index": {"mask": "ndvi>0.2 and green<0.27"}}.get(rule, {})
    leaf = {
        "otsu": (nir - red) > threshold_otsu((nir - red)[valid]),
        "index": ((nir - red) > 0.2 * (nir + red)) & (green < 0.27),
        "file": spirals(120, 90, seed=8),
        "nodata": np.ones((120, 90), bool),
    }[rule]
    if rule == "file":
        Image.fromarray(leaf).save(tmp_path / "field_mask.png")
    expected = whole_cleaned(leaf & valid, min_px, erode_px)
    found, _ = packed_mask(image, tmp_path / "out", read_tars, min_object_px=min_px, erode_px=erode_px, **options)
    assert 0 < expected.sum() < (leaf & valid).sum() or rule == "nodata"
    np.testing.assert_array_equal(found, expected[:112, :80])


def test_survey_and_writing_see_the_same_mask(tmp_path, field, read_tars, monkeypatch):
    surveyed = {}
    load_survey = job.load_survey

    def remember(*arguments):
        survey = load_survey(*arguments)
        surveyed.update({(tile.row, tile.col): tile.leaf_pixels for tile in survey.tiles})
        return survey

    monkeypatch.setattr(job, "load_survey", remember)
    options = {"mask": "otsu(ndvi)", "min_object_px": 20, "erode_px": 1}
    pack([field[0]], tmp_path / "out", PackOptions(tile_px=16, **WHOLE, **options))
    written = {
        tuple(sample["json"]["window"][:2]): int(sample["mask.png"].sum())
        for sample in read_tars(tmp_path / "out" / "train").values()
    }
    assert len(written) > 20
    assert written == {position: pixels for position, pixels in surveyed.items() if pixels}


@pytest.mark.parametrize("pattern", ["{stem}_leaf.tif", "masks/{stem}.png", "ABSOLUTE/{stem}.png"])
def test_mask_files_are_found_by_their_pattern(tmp_path, leaf_image, write_raster, read_tars, pattern):
    folder = tmp_path / "photos"
    pattern = pattern.replace("ABSOLUTE", str(tmp_path / "elsewhere"))
    leaves = {}
    for number in range(3):
        image = leaf_image(folder / f"a{number}.tif", size_px=16, seed=number)
        leaf = np.random.default_rng(10 + number).random((16, 16)) < 0.5
        file = folder / pattern.replace("{stem}", image.stem)
        file.parent.mkdir(exist_ok=True)
        if file.suffix == ".tif":
            write_raster(file, leaf[None].astype(np.uint8), None)
        else:
            Image.fromarray(leaf).save(file)
        leaves[f"a{number}_r00000_c00000"] = leaf
    summary = pack([folder], tmp_path / "out", PackOptions(tile_px=16, mask_files=pattern, **WHOLE))
    assert summary.num_images == 3
    samples = read_tars(tmp_path / "out" / "train")
    for key, leaf in leaves.items():
        np.testing.assert_array_equal(samples[key]["mask.png"], leaf)


def test_missing_mask_files_and_mask_files_of_another_size_are_named(tmp_path, leaf_image):
    image = leaf_image(tmp_path / "a.tif", size_px=16)
    with pytest.raises(ValueError, match=r"a.tif has no mask at .*/masks/a.png or .*correct --mask-files"):
        pack([image], tmp_path / "out", PackOptions(tile_px=16, mask_files="masks/{stem}.png"))
    Image.fromarray(np.ones((15, 16), bool)).save(tmp_path / "a_leaf.png")
    with pytest.raises(ValueError, match=r"mask .*a_leaf.png has 15 x 16 px but .*a.tif has 16 x 16 px"):
        pack([image], tmp_path / "out", PackOptions(tile_px=16, mask_files="{stem}_leaf.png"))


def test_a_failure_leaves_no_mask_behind(tmp_path, field):
    with pytest.raises(ValueError, match="no tile left"):
        pack([field[0]], tmp_path / "out", PackOptions(tile_px=16, mask="ndvi>0.9", erode_px=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["field.tif"]
