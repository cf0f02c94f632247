"""Rasters of every file type, value type and axis order give the same tiles."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.rasters import gdal
from msvae.shards.manifest import Manifest

from .cubes import EVERYWHERE, FIVE_NM, TOP, WHOLE, cube, packed, save_array


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
def test_hyperspectral_cubes_of_every_order_give_the_same_tile(tmp_path, write_raster, read_tars, interleave):
    wavelengths_nm = np.arange(400, 1000, 5).tolist()
    values = np.random.default_rng(1).integers(0, 10_000, (120, 48, 32), dtype=np.uint16)
    image = write_raster(tmp_path / "cube.img", values, None, mask=EVERYWHERE, driver="ENVI", interleave=interleave)
    header = image.with_suffix(".hdr")
    listed = ", ".join(map(str, wavelengths_nm))
    header.write_text(
        f"{header.read_text()}wavelength units = nm\nwavelength = {{{listed}}}\nreflectance scale factor = 20000\n"
    )
    tile, _, summary = packed(image, tmp_path / "out", read_tars, wavelengths_nm=(842, 476, 561))
    np.testing.assert_array_equal(tile, values[[88, 15, 32]][TOP])
    assert summary.bands.wavelengths_nm == (840, 475, 560)
    assert summary.bands.names == ("840nm", "475nm", "560nm")
    assert summary.scale == (1 / 20000,) * 3
    assert not summary.notices


def test_an_invalid_reflectance_scale_factor_is_named(tmp_path, write_raster, read_tars):
    image = write_raster(tmp_path / "cube.img", cube(), None, mask=EVERYWHERE, driver="ENVI")
    header = image.with_suffix(".hdr")
    header.write_text(f"{header.read_text()}reflectance scale factor = 0\n")
    with pytest.raises(ValueError, match=r"cube.img states reflectance scale factor '0', expected a number"):
        packed(image, tmp_path / "out", read_tars)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("uint8", "uint8"), ("int8", "int16"), ("uint16", "uint16"), ("int16", "int16"), ("float32", "float32")],
)
@pytest.mark.parametrize("ending", ["tif", "npy"])
def test_types_that_fit_are_stored_exactly(tmp_path, write_raster, read_tars, dtype, stored, ending):
    values = cube(dtype, highest=100)
    if ending == "tif":
        image = write_raster(tmp_path / "a.tif", values, None, mask=EVERYWHERE)
    else:
        image = save_array(tmp_path / "a.npy", values)
    tile, _, summary = packed(image, tmp_path / "out", read_tars, scale=0.01, offset=-0.1)
    assert tile.dtype == stored == summary.dtype
    np.testing.assert_array_equal(tile, values[TOP])
    assert (summary.scale, summary.offset) == ((0.01,) * 5, (-0.1,) * 5)


@pytest.mark.parametrize("ending", ["tif", "npy"])
@pytest.mark.parametrize("dtype", ["uint32", "int32", "uint64", "int64", "float64"])
def test_wider_types_are_stored_as_reflectance(tmp_path, write_raster, read_tars, dtype, ending):
    values = (np.random.default_rng(5).integers(0, 10**6, (5, 48, 32)) + 2**30).astype(dtype)
    if ending == "tif":
        image = write_raster(tmp_path / "a.tif", values, None, mask=EVERYWHERE)
    else:
        image = save_array(tmp_path / "a.npy", values)
    offset = -(2**30) * 1e-6
    tile, _, summary = packed(image, tmp_path / "out", read_tars, scale=1e-6, offset=offset)
    assert tile.dtype == np.float32
    np.testing.assert_allclose(tile, (values.astype(np.int64)[TOP] - 2**30) * 1e-6, rtol=1e-6, atol=1e-7)
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert (manifest.scale, manifest.offset) == ([1] * 5, [0] * 5)
    assert any(f"{dtype} is stored as float32 reflectance" in notice for notice in summary.notices)


def test_half_precision_and_foreign_byte_order_of_arrays_are_read(tmp_path, read_tars):
    half = cube("float16")
    tile, _, _ = packed(save_array(tmp_path / "half.npy", half), tmp_path / "half", read_tars)
    assert tile.dtype == np.float32
    np.testing.assert_array_equal(tile, half.astype(np.float32)[TOP])
    big_endian = cube().astype(">u2")
    tile, _, _ = packed(save_array(tmp_path / "big.npy", big_endian), tmp_path / "big", read_tars, scale=1e-4)
    np.testing.assert_array_equal(tile, big_endian[TOP])


def test_nan_in_an_array_is_background(tmp_path, read_tars):
    values = cube("float32")
    values[2, 3, 4] = np.nan
    tile, mask, summary = packed(save_array(tmp_path / "a.npy", values, mask=None), tmp_path / "out", read_tars)
    expected = np.ones((32, 32), bool)
    expected[3, 4] = False
    np.testing.assert_array_equal(mask, expected)
    assert tile[2, 3, 4] == 0
    assert any("from nodata, NaN or mask bands" in notice for notice in summary.notices)


def test_one_array_per_band_makes_an_image(tmp_path, read_tars):
    values = cube()
    (tmp_path / "plot").mkdir()
    for name, plane in zip(("red", "nir"), values[:2], strict=True):
        np.save(tmp_path / "plot" / f"{name}.npy", plane)
    options = {"band_files": ("red.npy", "nir.npy"), "mask": "ndvi>0", "scale": 1e-4}
    tile, mask, summary = packed(tmp_path / "plot", tmp_path / "out", read_tars, **options)
    np.testing.assert_array_equal(tile, values[:2][TOP])
    np.testing.assert_array_equal(mask, (values[1] > values[0])[:32])
    assert summary.bands.names == ("red", "nir")


def test_arrays_that_are_no_image_are_named_and_never_unpickled(tmp_path, read_tars):
    np.save(tmp_path / "objects.npy", np.array([[[print]]], object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(9))
    np.save(tmp_path / "complex.npy", np.zeros((5, 48, 32), complex))
    np.save(tmp_path / "bool.npy", np.zeros((5, 48, 32), bool))
    np.savez(tmp_path / "archive.npz", a=np.zeros(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    np.save(tmp_path / "cut.npy", cube())
    content = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[: len(content) // 2])
    for name, match in (
        ("objects", "cannot be opened"),
        ("flat", r"shape \(9,\), expected \(bands, height, width\)"),
        ("complex", "holds complex128, expected one of uint8"),
        ("bool", "holds bool, expected one of"),
        ("archive", "archive of arrays"),
        ("cut", "cannot be opened"),
    ):
        with pytest.raises(ValueError, match=f"{name}.npy {match}|{name}.npy has {match}|{name}.npy is an {match}"):
            packed(tmp_path / f"{name}.npy", tmp_path / "out", read_tars, mask="ndvi>0")


def write_axes(path, values_chw, axes, write_raster, pages=False):
    """Write the cube with its axes in another order, as a raster, as pages, or as an array."""
    turned = np.ascontiguousarray(values_chw.transpose(["chw".index(axis) for axis in axes]))
    if path.suffix == ".npy":
        np.save(path, turned)
    elif pages:
        tifffile.imwrite(path, turned, photometric="minisblack")
    else:
        write_raster(path, turned, None)
    Image.fromarray(np.ones(values_chw.shape[1:], bool)).save(path.with_name(f"{path.stem}_mask.png"))
    return path


KINDS = pytest.mark.parametrize(("ending", "pages"), [("npy", False), ("tif", False), ("tif", True)])


@KINDS
@pytest.mark.parametrize("axes", ["hwc", "hcw", "whc", "cwh"])
def test_bands_along_any_axis_give_the_same_tile(tmp_path, write_raster, read_tars, monkeypatch, axes, ending, pages):
    monkeypatch.setattr(gdal, "MAX_OPEN_FILES", 3)
    values = np.random.default_rng(2).integers(1, 9, (5, 70, 50), dtype=np.uint16)
    image = write_axes(tmp_path / f"a.{ending}", values, axes, write_raster, pages)
    options = {"axes": axes, "bands": ("4", "1"), "wavelengths_nm": (717, 475), "scale": 0.1, "tile_px": 16}
    summary = pack([image], tmp_path / "out", PackOptions(**(WHOLE | options)))
    assert summary.tiles == {"train": 12}
    for sample in read_tars(tmp_path / "out" / "train").values():
        row, col = sample["json"]["window"][:2]
        np.testing.assert_array_equal(sample["bands.npy"], values[[3, 0], row : row + 16, col : col + 16])


@KINDS
@pytest.mark.parametrize("axes", ["hwc", "hcw"])
def test_bands_on_a_wrong_axis_are_detected_and_the_suggested_option_works(
    tmp_path, write_raster, read_tars, axes, ending, pages
):
    image = write_axes(tmp_path / f"a.{ending}", cube(), axes, write_raster, pages)
    options = {"scale": 1e-4, "wavelengths_nm": FIVE_NM}
    with pytest.raises(ValueError, match=f"48 bands of .* px, which looks like 5 bands.*give --axes {axes}, or"):
        packed(image, tmp_path / "out", read_tars, **options)
    tile, _, _ = packed(image, tmp_path / "out", read_tars, axes=axes, **options)
    np.testing.assert_array_equal(tile, cube()[TOP])


@pytest.mark.parametrize(("given", "better"), [("hwc", "chw"), ("hcw", "chw")])
def test_axes_that_contradict_the_shape_are_refused(tmp_path, write_raster, read_tars, given, better):
    image = write_axes(tmp_path / "a.npy", cube(), "chw", write_raster)
    with pytest.raises(ValueError, match=rf"--axes {given}, with which .*a.npy would be .*give --axes {better}"):
        packed(image, tmp_path / "out", read_tars, axes=given, scale=1e-4)
    image = write_axes(tmp_path / "b.npy", cube(), "hwc", write_raster)
    with pytest.raises(ValueError, match=r"--axes chw, with which .*b.npy would be 48 bands.*give --axes hwc"):
        packed(image, tmp_path / "out", read_tars, axes="chw", scale=1e-4)


def test_a_small_hyperspectral_image_is_accepted(tmp_path, read_tars):
    values = np.random.default_rng(2).random((200, 40, 32), dtype=np.float32)
    image = save_array(tmp_path / "chip.npy", values, np.ones((40, 32), bool))
    tile, _, _ = packed(image, tmp_path / "out", read_tars, wavelengths_nm=tuple(range(400, 1000, 3)))
    np.testing.assert_array_equal(tile, values[:, :32])


def test_pages_of_a_tiff_are_bands_and_pages_of_other_sizes_are_refused(tmp_path, read_tars):
    tifffile.imwrite(tmp_path / "a.tif", cube(), photometric="minisblack")
    Image.fromarray(EVERYWHERE).save(tmp_path / "a_mask.png")
    tile, _, _ = packed(tmp_path / "a.tif", tmp_path / "out", read_tars, scale=1e-4)
    np.testing.assert_array_equal(tile, cube()[TOP])
    with tifffile.TiffWriter(tmp_path / "odd.tif") as tiff:
        tiff.write(cube()[0])
        tiff.write(cube()[0, :10])
    with pytest.raises(ValueError, match=r"odd.tif holds 2 pages, and page 2 has 10 x 32 px"):
        packed(tmp_path / "odd.tif", tmp_path / "none", read_tars, scale=1e-4, mask="ndvi>0")


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_nodata_option_replaces_nodata_of_the_file(tmp_path, write_raster, read_tars, dtype):
    values = cube().astype(dtype)
    values[1, 3], values[2, 5] = 7, 8
    image = write_raster(tmp_path / "a.tif", values, nodata=7)
    by_option = (values != 8).all(axis=0)[:32]
    assert 0 < (~by_option).sum() < by_option.size
    _, mask, _ = packed(image, tmp_path / "out", read_tars, nodata=8, scale=1e-4)
    np.testing.assert_array_equal(mask, by_option)
    array = save_array(tmp_path / "b.npy", values)
    _, mask, _ = packed(array, tmp_path / "array", read_tars, nodata=8, scale=1e-4)
    np.testing.assert_array_equal(mask, by_option)


@pytest.mark.parametrize("ending", ["tif", "npy"])
def test_nodata_option_is_the_mask_if_there_is_no_other(tmp_path, write_raster, read_tars, ending):
    values = cube()
    leaf = np.random.default_rng(11).random(values.shape[1:]) < 0.5
    values[:, ~leaf] = 0
    image = tmp_path / f"a.{ending}"
    if ending == "tif":
        write_raster(image, values)
    else:
        save_array(image, values, mask=None)
    _, mask, _ = packed(image, tmp_path / "out", read_tars, nodata=0, scale=1e-4)
    np.testing.assert_array_equal(mask, leaf[:32])


def test_a_nodata_value_outside_the_type_is_refused(tmp_path, write_raster, read_tars):
    image = write_raster(tmp_path / "a.tif", cube(), mask=EVERYWHERE, scale=1e-4)
    for nodata in (-9999, float("nan"), 0.5):
        with pytest.raises(ValueError, match=f"got --nodata {nodata:g} but .*a.tif holds uint16"):
            packed(image, tmp_path / "out", read_tars, nodata=nodata)


def test_pixels_hidden_by_a_mask_band_are_never_leaf(tmp_path, write_raster, read_tars):
    shown = np.random.default_rng(9).random((48, 32)) < 0.5
    image = write_raster(tmp_path / "a.tif", cube(), mask=EVERYWHERE, scale=1e-4)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(image, "r+") as raster:
        raster.write_mask(shown)
    _, mask, _ = packed(image, tmp_path / "out", read_tars)
    np.testing.assert_array_equal(mask, shown[:32])


def test_band_names_in_envi_headers_are_used(tmp_path, write_raster, read_tars):
    image = write_raster(tmp_path / "a.dat", cube()[:2], None, ("red", "nir 2"), mask=EVERYWHERE, driver="ENVI")
    header = image.with_suffix(".hdr")
    header.write_text(f"{header.read_text()}wavelength units = Micrometers\nwavelength = {{0.668, 0.84}}\n")
    _, _, summary = packed(image, tmp_path / "out", read_tars, scale=1e-4)
    assert summary.bands.names == ("red", "nir 2")
    assert summary.bands.wavelengths_nm == (668, 840)


def test_unused_files_of_a_folder_are_listed_and_no_raster_is_lost(tmp_path, write_raster, leaf_image):
    folder = tmp_path / "leaves"
    leaf_image(folder / "a0.tif", 64, seed=0)
    write_raster(folder / "a1.jp2", cube(), mask=EVERYWHERE, driver="JP2OpenJPEG", QUALITY=100, REVERSIBLE="YES")
    write_raster(folder / "a2.bsq", cube(), mask=EVERYWHERE, driver="ENVI")
    (folder / "masks").mkdir()
    for stem in ("a1", "a2"):
        (folder / f"{stem}_mask.png").rename(folder / "masks" / f"{stem}.png")
    Image.fromarray(np.ones((64, 64), bool)).save(folder / "masks" / "a0.png")
    for name in ("a0.tif.aux.xml", "a0.tfw", ".hidden"):
        (folder / name).write_text("")
    options = PackOptions(tile_px=32, mask_files="masks/{stem}.png", split=(1, 0, 0), scale=1e-4)
    summary = pack([folder], tmp_path / "all", options)
    assert summary.num_images == 3
    assert not [notice for notice in summary.notices if "not used in" in notice]
    for name in ("notes.txt", "photo.png", "old/a3.tif"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "a0.tif").read_bytes())
    (note,) = [notice for notice in pack([folder], tmp_path / "more", options).notices if "not used in" in notice]
    assert f"in {folder}: notes.txt, old, photo.png; only *.tif" in note


def test_a_cube_without_its_header_is_an_error(tmp_path, write_raster, leaf_image):
    leaf_image(tmp_path / "leaves" / "a0.tif")
    write_raster(tmp_path / "leaves" / "a2.bsq", cube(), mask=EVERYWHERE, driver="ENVI").with_suffix(".hdr").unlink()
    with pytest.raises(ValueError, match=r"a2\.bsq cannot be opened"):
        pack([tmp_path / "leaves"], tmp_path / "out", PackOptions(tile_px=32))
