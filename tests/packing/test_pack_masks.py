"""Leaf pixels are those of the mask, and never pixels without data."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack

TRAIN_ONLY = {"tile_px": 16, "split": (1, 0, 0), "min_coverage": 0.0}


def packed_mask(tmp_path, read_tars):
    (sample,) = read_tars(tmp_path / "out" / "train").values()
    return sample["mask.png"], sample["bands.npy"]


@pytest.mark.parametrize(
    ("expression", "pair", "holds"),
    [
        ("ndvi>0.1", (4, 2), np.greater),
        (" NDVI >= 1e-1", (4, 2), np.greater_equal),
        ("ndre<.25", (4, 3), np.less),
        ("gndvi<=-0.2", (4, 1), np.less_equal),
    ],
)
def test_index_masks_are_computed_in_reflectance(tmp_path, write_raster, read_tars, expression, pair, holds):
    rng = np.random.default_rng(3)
    values = rng.integers(0, 60_000, (5, 16, 16), dtype=np.uint16)
    values[:, 0, 0] = 0
    image = write_raster(tmp_path / "a.tif", values)
    pack([image], tmp_path / "out", PackOptions(mask=expression, **TRAIN_ONLY))
    first, second = (values[band].astype(np.float64) / 65535 for band in pair)
    with np.errstate(invalid="ignore"):
        expected = holds(
            (first - second) / (first + second), float(expression.split("=")[-1].split("<")[-1].split(">")[-1])
        )
    expected[0, 0] = False
    np.testing.assert_array_equal(packed_mask(tmp_path, read_tars)[0], expected)


def test_offsets_are_used_in_indices(tmp_path, write_raster, read_tars):
    values = np.full((5, 16, 16), 1000, np.uint16)
    values[4, :8] = 1100
    image = write_raster(tmp_path / "a.tif", values, scale=0.0001)
    with rasterio.open(image, "r+") as raster:
        raster.offsets = (-0.1,) * 5
    pack([image], tmp_path / "out", PackOptions(mask="ndvi>0.9", **TRAIN_ONLY))
    leaf, _ = packed_mask(tmp_path, read_tars)
    assert leaf[:8].all() and not leaf[8:].any()


def test_a_nodata_pixel_is_background_under_every_condition(tmp_path, write_raster, read_tars):
    values = np.full((5, 16, 16), 100, np.uint16)
    values[4] = 900
    values[0, 3] = 0
    image = write_raster(tmp_path / "a.tif", values, nodata=0)
    pack([image], tmp_path / "out", PackOptions(mask="ndvi>0.5", **TRAIN_ONLY))
    leaf, _ = packed_mask(tmp_path, read_tars)
    assert not leaf[3].any() and leaf.sum() == 15 * 16


@pytest.mark.parametrize("mode", ["1", "L", "RGBA", "F"])
def test_mask_files_of_every_type_mean_the_same(tmp_path, write_raster, read_tars, mode):
    leaf = np.random.default_rng(4).random((16, 16)) < 0.5
    image = write_raster(tmp_path / "a.tif", np.ones((5, 16, 16), np.float32))
    if mode == "F":
        write_raster(tmp_path / "a_mask.tif", np.where(leaf, 0.51, 0.5).astype(np.float32)[None], None)
    else:
        painted = np.zeros((16, 16, 4), np.uint8)
        painted[..., 1], painted[..., 3] = leaf * 2, 255
        content = {"1": leaf, "L": leaf.astype(np.uint8), "RGBA": painted}[mode]
        Image.fromarray(content).save(tmp_path / "a_mask.png")
    pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    np.testing.assert_array_equal(packed_mask(tmp_path, read_tars)[0], leaf)


WHITE, BLACK, GREEN, TRANSPARENT_WHITE = (255, 255, 255, 255), (0, 0, 0, 255), (0, 128, 0, 255), (255, 255, 255, 0)


@pytest.mark.parametrize(
    ("background", "leaf_colour", "leaf_number"),
    [
        (BLACK, WHITE, 1),
        (BLACK, WHITE, 0),  # as Image.quantize(2) writes a black and white mask
        (BLACK, GREEN, 1),
        (TRANSPARENT_WHITE, GREEN, 1),
    ],
)
def test_a_mask_with_a_palette_is_read_by_its_colours(
    tmp_path, write_raster, read_tars, background, leaf_colour, leaf_number
):
    leaf = np.random.default_rng(4).random((16, 16)) < 0.5
    image = write_raster(tmp_path / "a.tif", np.ones((5, 16, 16), np.float32))
    save_with_palette(tmp_path / "a_mask.png", leaf, background, leaf_colour, leaf_number)
    pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    np.testing.assert_array_equal(packed_mask(tmp_path, read_tars)[0], leaf)


@pytest.mark.parametrize(
    ("background", "leaf_colour", "leaf_number"),
    [(WHITE, GREEN, 1), (GREEN, WHITE, 1), (BLACK, GREEN, 0)],
)
def test_a_mask_whose_palette_is_ambiguous_is_refused(tmp_path, write_raster, background, leaf_colour, leaf_number):
    leaf = np.random.default_rng(4).random((16, 16)) < 0.5
    image = write_raster(tmp_path / "a.tif", np.ones((5, 16, 16), np.float32))
    save_with_palette(tmp_path / "a_mask.png", leaf, background, leaf_colour, leaf_number)
    with pytest.raises(ValueError, match=r"a_mask.png has a palette in which 0 has the colour \(.*without a palette"):
        pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))


def save_with_palette(path, leaf, background, leaf_colour, leaf_number):
    mask = Image.fromarray(np.where(leaf, leaf_number, 1 - leaf_number).astype(np.uint8), mode="P")
    colours = [leaf_colour, background] if leaf_number == 0 else [background, leaf_colour]
    mask.putpalette([value for colour in colours for value in colour[:3]])
    mask.save(path, transparency=bytes(colour[3] for colour in colours))


@pytest.mark.parametrize("hidden_by", ["nodata", "mask band", "alpha"])
def test_hidden_pixels_of_a_mask_file_are_background(tmp_path, write_raster, read_tars, hidden_by):
    rng = np.random.default_rng(7)
    leaf, hidden = rng.random((2, 16, 16)) < 0.5
    image = write_raster(tmp_path / "a.tif", np.ones((5, 16, 16), np.float32))
    painted = np.where(leaf, 1, 0).astype(np.uint8)
    if hidden_by == "alpha":
        white_where_erased = np.where(hidden, 255, painted)
        channels = [white_where_erased, white_where_erased, white_where_erased, np.where(hidden, 0, 255)]
        Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(tmp_path / "a_mask.png")
    elif hidden_by == "nodata":
        write_raster(tmp_path / "a_mask.tif", np.where(hidden, 255, painted).astype(np.uint8)[None], None, nodata=255)
    else:
        mask = write_raster(tmp_path / "a_mask.tif", painted[None], None)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(mask, "r+") as raster:
            raster.write_mask(~hidden)
    pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    np.testing.assert_array_equal(packed_mask(tmp_path, read_tars)[0], leaf & ~hidden)


@pytest.mark.parametrize("stated", ["the same", "0.4 px off", "no reference system", "nothing"])
def test_a_mask_less_than_half_a_pixel_off_or_without_georeference_is_used_unchanged(
    tmp_path, write_raster, read_tars, on_earth, stated
):
    leaf = np.random.default_rng(8).random((16, 16)) < 0.5
    image = write_raster(tmp_path / "a.tif", np.ones((5, 16, 16), np.float32), **on_earth)
    georeference = {
        "the same": on_earth,
        "0.4 px off": on_earth | {"transform": on_earth["transform"] @ Affine.translation(0.4, 0)},
        "no reference system": {"transform": on_earth["transform"]},
        "nothing": {},
    }[stated]
    write_raster(tmp_path / "a_mask.tif", leaf[None].astype(np.uint8), None, **georeference)
    pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    np.testing.assert_array_equal(packed_mask(tmp_path, read_tars)[0], leaf)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_non_finite_pixels_are_never_leaf_and_stored_as_zero(tmp_path, write_raster, read_tars, bad):
    values = np.ones((5, 16, 16), np.float64)
    values[3, 2, 5] = bad
    image = write_raster(tmp_path / "a.tif", values, mask=np.ones((16, 16), bool))
    pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    leaf, bands = packed_mask(tmp_path, read_tars)
    expected = np.ones((16, 16), bool)
    expected[2, 5] = False
    np.testing.assert_array_equal(leaf, expected)
    assert bands[3, 2, 5] == 0 and np.isfinite(bands).all() and bands.sum() == 5 * 256 - 1


@pytest.mark.parametrize("hidden_by", ["nodata", "mask band", "alpha", "nan"])
def test_pixels_that_an_image_hides_are_background_despite_its_mask_file(tmp_path, write_raster, read_tars, hidden_by):
    hidden = np.random.default_rng(5).random((16, 16)) < 0.5
    values = np.ones((5, 16, 16), np.float32 if hidden_by == "nan" else np.uint16)
    if hidden_by in ("nan", "nodata"):
        values[2, hidden] = np.nan if hidden_by == "nan" else 9
    if hidden_by == "alpha":
        values = np.concatenate([values, np.where(hidden, 0, 65535).astype(np.uint16)[None]])
    nodata = 9 if hidden_by == "nodata" else None
    wavelengths_nm = None if hidden_by == "alpha" else (475, 560, 668, 717, 840)
    everywhere = np.ones((16, 16), bool)
    image = write_raster(tmp_path / "a.tif", values, wavelengths_nm, mask=everywhere, scale=1e-4, nodata=nodata)
    if hidden_by == "alpha":
        with rasterio.open(image, "r+") as raster:
            raster.colorinterp = [*raster.colorinterp[:5], ColorInterp.alpha]
    if hidden_by == "mask band":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(image, "r+") as raster:
            raster.write_mask(~hidden)
    summary = pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    leaf, bands = packed_mask(tmp_path, read_tars)
    np.testing.assert_array_equal(leaf, ~hidden)
    assert len(bands) == 5 and summary.leaf_pixels == {"train": int((~hidden).sum())}


@pytest.mark.parametrize(("dtype", "nodata"), [("uint16", 7), ("float32", None), ("float32", -1.0)])
def test_nodata_or_nan_is_the_mask_if_there_is_no_other(tmp_path, write_raster, read_tars, dtype, nodata):
    values = np.ones((5, 16, 16), dtype)
    values[1, 4] = np.nan if nodata is None else nodata
    image = write_raster(tmp_path / "a.tif", values, scale=1e-4, nodata=nodata)
    summary = pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    leaf, _ = packed_mask(tmp_path, read_tars)
    assert not leaf[4].any() and leaf.sum() == 15 * 16
    assert any("from nodata, NaN or mask bands" in notice for notice in summary.notices)


@pytest.mark.parametrize("leaf_value", [255, 1])
def test_a_mask_is_refused_only_if_all_its_leaf_pixels_are_nodata(tmp_path, write_raster, read_tars, leaf_value):
    """gdal_calc writes such masks for `255*(ndvi>0.3)` and for `ndvi>0.3`."""
    leaf = np.random.default_rng(8).random((16, 16)) < 0.5
    image = write_raster(tmp_path / "a.tif", np.full((5, 16, 16), 500, np.uint16), scale=1e-4)
    write_raster(tmp_path / "a_mask.tif", (leaf * leaf_value).astype(np.uint8)[None], None, nodata=255)
    if leaf_value == 255:
        with pytest.raises(ValueError, match=r"a_mask.tif is 0 or its nodata value 255 everywhere"):
            pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
        return
    pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    np.testing.assert_array_equal(packed_mask(tmp_path, read_tars)[0], leaf)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_nodata_option_that_no_pixel_has_is_refused(tmp_path, write_raster, dtype):
    image = write_raster(tmp_path / "a.tif", np.full((5, 16, 16), 1, dtype), scale=1e-4)
    with pytest.raises(ValueError, match=r"a.tif has no leaf mask"):
        pack([image], tmp_path / "out", PackOptions(nodata=9, **TRAIN_ONLY))


def test_a_mask_band_is_the_mask_if_there_is_no_other(tmp_path, write_raster, read_tars):
    """Reconstructions of integer images have such a mask band."""
    leaf = np.random.default_rng(6).random((16, 16)) < 0.5
    image = write_raster(tmp_path / "a.tif", np.full((5, 16, 16), 500, np.uint16), scale=1e-4)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(image, "r+") as raster:
        raster.write_mask(leaf)
    pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    np.testing.assert_array_equal(packed_mask(tmp_path, read_tars)[0], leaf)


@pytest.mark.parametrize("ending", ["png", "PNG", "Png", "tif", "TIF", "TIFF"])
def test_a_mask_file_is_found_with_an_ending_in_upper_or_lower_case(tmp_path, write_raster, read_tars, ending):
    leaf = np.random.default_rng(9).random((16, 16)) < 0.5
    values = np.full((5, 16, 16), 500, np.uint16)
    image = write_raster(tmp_path / "a.b.tif", values, scale=1e-4, nodata=0)
    Image.fromarray(leaf.astype(np.uint8)).save(tmp_path / f"a.b_mask.{ending}")
    (tmp_path / "a.b_mask.txt").write_text("drawn by hand")
    pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    np.testing.assert_array_equal(packed_mask(tmp_path, read_tars)[0], leaf)


def test_mask_files_among_the_image_arguments_are_not_images(tmp_path, leaf_image, write_raster):
    images = [leaf_image(tmp_path / f"leaf{i}.tif", seed=i, mask=None) for i in range(3)]
    for image in images:
        write_raster(image.with_name(f"{image.stem}_mask.tif"), np.ones((1, 64, 64), np.uint8), None)
    everything = sorted(tmp_path.glob("*.tif"))
    assert len(everything) == 6
    assert pack(everything, tmp_path / "a", PackOptions(tile_px=16)).num_images == 3
    assert pack([tmp_path], tmp_path / "b", PackOptions(tile_px=16)).num_images == 3
