"""Bands are selected by wavelength, scales come from the raster, and every assumption is reported."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.shards.manifest import Manifest

from .cubes import EVERYWHERE, FIVE_NM, TOP, cube, packed

DEFAULTS_NM = (474.73, 538.71, 650.665, 730.635, 850.59)
TRAIN_ONLY = {"tile_px": 16, "split": (1, 0, 0)}
LEAF = np.ones((16, 16), bool)


def constant_bands(*levels: float, dtype: str = "uint16") -> np.ndarray:
    return np.stack([np.full((16, 16), level, dtype) for level in levels])


def packed_means(out: Path) -> list[float]:
    return Manifest.load(out / "train").statistics.mean


@pytest.mark.parametrize(
    ("units", "factor"), [("nm", 1), ("Nanometers", 1), ("um", 1e-3), ("Micrometers", 1e-3), ("Unknown", 1e-3)]
)
def test_nearest_bands_are_used_in_the_requested_order(tmp_path, write_raster, units, factor):
    stated = tuple(nm * factor for nm in (400.0, 480.0, 555.0, 668.0, 840.0))
    image = write_raster(
        tmp_path / "a.tif", constant_bands(1, 2, 3, 4, 5), wavelengths_nm=stated, units=units, mask=LEAF
    )
    options = PackOptions(wavelengths_nm=(850, 475, 560), scale=0.1, **TRAIN_ONLY)
    summary = pack([image], tmp_path / "out", options)
    assert packed_means(tmp_path / "out") == pytest.approx([0.5, 0.2, 0.3])
    assert summary.bands.wavelengths_nm == pytest.approx((840, 480, 555))
    assert summary.notices == ()


def test_wavelengths_of_envi_headers_are_read(tmp_path, write_raster):
    image = write_raster(tmp_path / "a.dat", constant_bands(1, 2, 3), None, mask=LEAF, driver="ENVI")
    header = image.with_suffix(".hdr")
    header.write_text(header.read_text() + "wavelength units = Nanometers\nwavelength = {475, 668, 840}\n")
    for name, argument in (("by_data", image), ("by_header", header), ("by_folder", tmp_path)):
        summary = pack([argument], tmp_path / "out" / name, PackOptions(scale=1, **TRAIN_ONLY))
        assert summary.bands.wavelengths_nm == (475, 668, 840)
        assert summary.num_images == 1


def test_five_unlabelled_bands_become_the_default_bands_with_a_notice(tmp_path, write_raster):
    image = write_raster(tmp_path / "a.tif", constant_bands(1, 2, 3, 4, 5), None, mask=LEAF)
    summary = pack([image], tmp_path / "out", PackOptions(scale=1, **TRAIN_ONLY))
    assert summary.bands.wavelengths_nm == DEFAULTS_NM
    assert any("no wavelengths stated" in notice for notice in summary.notices)


@pytest.mark.parametrize(
    "names", [("blue", "green", "nir", "red", "red_edge"), ("Blue", "Green", "NIR", "Red", "RedEdge")]
)
def test_default_wavelengths_follow_the_names_and_not_the_order(tmp_path, write_raster, names):
    for level, name in enumerate(names, start=1):
        write_raster(tmp_path / "plot" / f"{name}.tif", constant_bands(level, 255), None)
    shutil.copy(tmp_path / "plot" / f"{names[0]}.tif", tmp_path / "plot_mask.tif")
    options = PackOptions(band_files=tuple(f"{name}.tif" for name in names), scale=1, **TRAIN_ONLY)
    summary = pack([tmp_path / "plot"], tmp_path / "out", options)
    assert summary.bands.names == names
    assert summary.bands.wavelengths_nm == tuple(DEFAULTS_NM[i] for i in (0, 1, 4, 2, 3))
    assert packed_means(tmp_path / "out") == [1, 2, 3, 4, 5]


def test_images_with_another_band_order_are_reordered_by_wavelength(tmp_path, write_raster):
    first = write_raster(tmp_path / "a.tif", constant_bands(1, 2, 3), (475, 668, 840), mask=LEAF)
    second = write_raster(tmp_path / "b.tif", constant_bands(3, 1, 2), (842, 476, 667), mask=LEAF)
    pack([first, second], tmp_path / "out", PackOptions(scale=1, **TRAIN_ONLY))
    assert packed_means(tmp_path / "out") == [1, 2, 3]


COLOURS = ("blue", "green", "red", "red_edge", "nir")
SPELLED_OTHERWISE = ("NIR", "RedEdge", "Red", "Green", "Blue")


def test_images_with_another_band_order_are_reordered_by_name_in_any_spelling(tmp_path, write_raster):
    write_raster(tmp_path / "in" / "a.tif", constant_bands(1, 2, 3, 4, 5), None, names=COLOURS, mask=LEAF)
    write_raster(tmp_path / "in" / "b.tif", constant_bands(5, 4, 3, 2, 1), None, names=SPELLED_OTHERWISE, mask=LEAF)
    summary = pack([tmp_path / "in"], tmp_path / "out", PackOptions(scale=1, **TRAIN_ONLY))
    assert summary.num_images == 2
    assert packed_means(tmp_path / "out") == [1, 2, 3, 4, 5]


def test_images_with_other_band_names_are_refused_unless_wavelengths_confirm_the_order(tmp_path, write_raster):
    levels = constant_bands(1, 2, 3, 4, 5)
    write_raster(tmp_path / "in" / "a.tif", levels, None, names=COLOURS, mask=LEAF)
    write_raster(tmp_path / "in" / "b.tif", levels, None, names=("B2", "B3", "B4", "B5", "B8"), mask=LEAF)
    with pytest.raises(ValueError, match=r"b\.tif names its bands B2, B3, B4, B5, B8, which are not those"):
        pack([tmp_path / "in"], tmp_path / "out", PackOptions(scale=1, **TRAIN_ONLY))
    pack([tmp_path / "in"], tmp_path / "out", PackOptions(scale=1, wavelengths_nm=DEFAULTS_NM, **TRAIN_ONLY))
    assert packed_means(tmp_path / "out") == [1, 2, 3, 4, 5]


def test_a_fourth_band_that_gdal_declares_as_alpha_is_data_if_four_bands_are_requested(tmp_path, write_raster):
    values = constant_bands(10, 20, 30, 0, dtype="uint8")
    image = write_raster(tmp_path / "a.tif", values, None, mask=LEAF)
    with warnings.catch_warnings(action="ignore"), rasterio.open(image) as raster:
        assert raster.colorinterp[3] == ColorInterp.alpha
    options = PackOptions(wavelengths_nm=(560, 668, 717, 840), scale=1, **TRAIN_ONLY)
    assert pack([image], tmp_path / "out", options).leaf_pixels == {"train": 256}
    assert packed_means(tmp_path / "out") == [10, 20, 30, 0]


def test_transparent_pixels_are_never_leaf(tmp_path, write_raster):
    values = np.concatenate([constant_bands(1, 2, 3, 4, 5), constant_bands(65535)])
    values[5, :4] = 0
    image = write_raster(tmp_path / "a.tif", values, None, mask=LEAF)
    with rasterio.open(image, "r+") as raster:
        raster.colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * 4 + [ColorInterp.alpha]
    summary = pack([image], tmp_path / "out", PackOptions(scale=1, **TRAIN_ONLY))
    assert len(summary.bands) == 5
    assert summary.leaf_pixels == {"train": 12 * 16}


@pytest.mark.parametrize(
    ("dtype", "stored", "options", "raster_scale", "reflectance", "said"),
    [
        ("uint16", 65535, {}, None, 1.0, True),
        ("uint8", 51, {}, None, 0.2, True),
        ("uint16", 5000, {}, 0.0001, 0.5, False),
        ("uint16", 5000, {"scale": 0.0002}, 0.0001, 1.0, False),
        ("int16", 5000, {"scale": 0.0001}, None, 0.5, False),
        ("float32", 0.25, {}, None, 0.25, False),
        ("float64", 0.25, {}, None, 0.25, False),
    ],
)
def test_scale_comes_from_the_option_else_the_raster_else_the_type(
    tmp_path, write_raster, dtype, stored, options, raster_scale, reflectance, said
):
    values = constant_bands(*[stored] * 5, dtype=dtype)
    image = write_raster(tmp_path / "a.tif", values, scale=raster_scale, mask=LEAF)
    summary = pack([image], tmp_path / "out", PackOptions(**options, **TRAIN_ONLY))
    assert packed_means(tmp_path / "out") == pytest.approx([reflectance] * 5)
    assert summary.dtype == ("float32" if dtype == "float64" else dtype)
    assert any("no scale stated" in notice for notice in summary.notices) is said


@pytest.mark.parametrize(("dtype", "value"), [("float32", 4000), ("float64", 4000), ("float32", 30)])
def test_floats_that_cannot_be_reflectance_are_refused_unless_their_scale_is_given(
    tmp_path, write_raster, dtype, value
):
    values = constant_bands(value, value, value, value, value, dtype=dtype)
    values[:2, :, :7] = 0.1
    image = write_raster(tmp_path / "a.tif", values, mask=LEAF)
    with pytest.raises(ValueError, match=r"a.tif cannot hold reflectance.*give --scale, such as 0.0001"):
        pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    assert not (tmp_path / "out").exists()
    pack([image], tmp_path / "scaled", PackOptions(scale=1 / (2 * value), **TRAIN_ONLY))
    assert packed_means(tmp_path / "scaled")[4] == pytest.approx(0.5)
    insisted = pack([image], tmp_path / "insisted", PackOptions(scale=1, **TRAIN_ONLY))
    assert any(f"mean leaf reflectance is {value}" in notice for notice in insisted.notices)


def test_a_few_bright_pixels_and_a_bright_background_are_accepted_as_reflectance(tmp_path, write_raster):
    values = constant_bands(*[0.3] * 5, dtype="float32")
    values[:, :7], values[:, 9:] = 50, 4000
    image = write_raster(tmp_path / "a.tif", values, mask=np.arange(16)[:, None].repeat(16, 1) < 15 - 1)
    with pytest.raises(ValueError, match="cannot hold reflectance"):
        pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))
    values[:, 3:] = 0.3
    values[:, 14:] = 4000
    image = write_raster(tmp_path / "a.tif", values, mask=np.arange(16)[:, None].repeat(16, 1) < 14)
    pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY))


@pytest.mark.parametrize(
    ("dtype", "said"), [("uint8", "such as 0.01 for percent"), ("uint16", "such as 0.0001 for reflectance x 10000")]
)
def test_the_notice_of_a_missing_scale_suggests_one_that_fits_the_type(tmp_path, write_raster, dtype, said):
    image = write_raster(tmp_path / "a.tif", constant_bands(*[50] * 5, dtype=dtype), mask=LEAF)
    (note,) = pack([image], tmp_path / "out", PackOptions(**TRAIN_ONLY)).notices
    assert note.startswith(f"no scale stated: {dtype} 0..") and note.endswith(said)


@pytest.mark.parametrize(
    ("bands", "positions"), [(("3", "1"), [2, 0]), (("NIR", "blue"), [4, 0]), (("Red_Edge", "2"), [3, 1])]
)
def test_bands_are_chosen_by_number_and_name(tmp_path, write_raster, read_tars, bands, positions):
    names = ("blue", "green", "red", "red_edge", "nir")
    image = write_raster(tmp_path / "a.tif", cube(), None, names=names, mask=EVERYWHERE, scale=1e-4)
    tile, _, summary = packed(image, tmp_path / "out", read_tars, bands=bands)
    np.testing.assert_array_equal(tile, cube()[positions][TOP])
    assert summary.bands.names == tuple(names[i] for i in positions)
    assert any("no wavelengths stated: assumed" in notice for notice in summary.notices)


@pytest.mark.parametrize("band", ["0", "6", "rot", "Band", "-1"])
def test_a_band_that_does_not_exist_is_named(tmp_path, write_raster, read_tars, band):
    names = ("band", "BAND", "red", "red_edge", "nir")
    image = write_raster(tmp_path / "a.tif", cube(), names=names, mask=EVERYWHERE, scale=1e-4)
    with pytest.raises(ValueError, match=f"got --bands {band} but .*a.tif"):
        packed(image, tmp_path / "out", read_tars, bands=("red", band))


def test_band_numbers_count_transparency_bands_too(tmp_path, write_raster, read_tars):
    values = np.concatenate([cube(), cube()[:1]])
    values[3, :4] = 0
    image = write_raster(tmp_path / "a.tif", values, None, mask=EVERYWHERE, scale=1e-4)
    with rasterio.open(image, "r+") as raster:
        kinds = [rasterio.enums.ColorInterp.undefined] * 6
        kinds[3] = rasterio.enums.ColorInterp.alpha
        raster.colorinterp = kinds
    tile, mask, _ = packed(image, tmp_path / "a", read_tars, bands=("1", "5"), wavelengths_nm=(475, 840))
    np.testing.assert_array_equal(tile, values[[0, 4]][TOP])
    assert not mask[:4].any() and mask[4:].all()
    tile, mask, _ = packed(image, tmp_path / "b", read_tars, bands=("1", "4"), wavelengths_nm=(475, 840))
    np.testing.assert_array_equal(tile, values[[0, 3]][TOP])
    assert mask.all()


def test_tolerance_of_wavelengths_is_an_option(tmp_path, write_raster, read_tars):
    image = write_raster(tmp_path / "a.tif", cube(), FIVE_NM, mask=EVERYWHERE, scale=1e-4)
    with pytest.raises(ValueError, match=r"none within 20 nm of 590 nm, the nearest is 560 nm.*--tolerance-nm"):
        packed(image, tmp_path / "out", read_tars, wavelengths_nm=(590, 840))
    tile, _, _ = packed(image, tmp_path / "out", read_tars, wavelengths_nm=(590, 840), tolerance_nm=30)
    np.testing.assert_array_equal(tile, cube()[[1, 4]][TOP])
    with pytest.raises(ValueError, match="none within 1 nm of 838 nm"):
        packed(image, tmp_path / "none", read_tars, wavelengths_nm=(560, 838), tolerance_nm=1)
