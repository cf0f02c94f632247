"""`msvae reconstruct`: an image of any size becomes an equal file with reconstructed leaf pixels."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from msvae.inference import sliding_window
from msvae.inference.raster_output import leaf_values
from msvae.rasters.pixel_format import PixelFormat

from .conftest import no_reconstruction, read, reconstruct

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def in_one_pass(model, values, scale, leaf):
    """Return reflectance (C, H, W) of one call of the model; sides are padded to multiples of 8 without leaf."""
    height, width = leaf.shape
    padded = torch.zeros(1, len(values), -(-height // 8) * 8, -(-width // 8) * 8)
    padded[0, :, :height, :width] = torch.from_numpy(values * scale)
    mask = torch.zeros_like(padded[:, :1], dtype=torch.bool)
    mask[0, 0, :height, :width] = torch.from_numpy(leaf.copy())
    with torch.no_grad():
        return model.decode(model.encode(padded, mask=mask).latent_dist.mode()).sample[0, :, :height, :width].numpy()


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint16", None), ("uint16", 0), ("float32", -9999.0), ("float32", None)]
)
def test_type_scale_nodata_bands_and_georeference_are_kept(model_folder, write_field, tmp_path, dtype, nodata):
    image = write_field(tmp_path / "field.tif", 70, 51, dtype, nodata=nodata)
    reconstruct(model_folder, image, tmp_path / "out.tif")
    with rasterio.open(image) as before, rasterio.open(tmp_path / "out.tif") as after:
        for name in ("crs", "transform", "shape", "dtypes", "scales", "offsets", "descriptions", "nodata", "count"):
            assert getattr(after, name) == getattr(before, name), name
        assert [float(after.tags(band)["wavelength"]) for band in after.indexes] == [
            float(before.tags(band)["wavelength"]) for band in before.indexes
        ]
        assert after.profile["tiled"]
        assert after.compression.value == "DEFLATE"


@pytest.mark.parametrize(("dtype", "scale"), [("uint16", 1e-4), ("float32", 1.0)])
def test_an_image_that_fits_into_a_window_equals_one_call_of_the_model(
    model, model_folder, write_field, tmp_path, dtype, scale
):
    image = write_field(tmp_path / "field.tif", 70, 51, dtype)
    output = reconstruct(model_folder, image, tmp_path / "out.tif")
    leaf = np.asarray(Image.open(tmp_path / "field_mask.png"))
    expected = in_one_pass(model, read(image), scale, leaf)
    found = read(tmp_path / "out.tif") * scale
    step = scale if dtype == "uint16" else 1e-6
    np.testing.assert_allclose(found[:, leaf], expected[:, leaf].clip(min=0 if dtype == "uint16" else None), atol=step)
    error = np.mean((found - read(image) * scale)[:, leaf].astype(np.float64) ** 2)
    assert f"{leaf.sum():,} leaf pixels, PSNR {-10 * np.log10(error):.2f} dB" in output
    assert "spectral angle" in output


def test_windows_differ_by_less_than_one_percent_from_one_pass_and_have_no_seams(
    model, model_folder, write_field, tmp_path
):
    """The relative RMS difference on the leaf is small, and it has no larger steps at the borders of windows."""
    image = write_field(tmp_path / "field.tif", 452, 387, "float32")
    reconstruct(model_folder, image, tmp_path / "out.tif", "--tile", 192)
    leaf = np.asarray(Image.open(tmp_path / "field_mask.png"))
    expected, found = in_one_pass(model, read(image), 1.0, leaf), read(tmp_path / "out.tif")
    difference = np.where(leaf, found - expected, 0)
    relative = np.sqrt(np.mean(difference[:, leaf] ** 2) / np.mean(expected[:, leaf] ** 2))
    assert relative < 0.01
    for axis, starts in ((1, (128, 264)), (2, (96, 200))):
        inside = np.logical_and(*(np.delete(leaf, edge, axis - 1) for edge in (0, -1)))
        steps = np.abs(np.diff(difference, axis=axis)).sum(axis=0)
        along = np.where(inside, steps, np.nan)
        profile = np.nanmean(along, axis=2 - axis)
        borders = [profile[max(0, start - 2) : start + 30].max() for start in starts]
        assert max(borders) < 4 * profile.mean(), axis


def test_the_background_changes_no_bit_and_becomes_nodata(model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 150, 90, "float32")
    leaf = np.asarray(Image.open(tmp_path / "field_mask.png"))
    other = Path(shutil.copy(image, tmp_path / "other.tif"))
    shutil.copy(tmp_path / "field_mask.png", tmp_path / "other_mask.png")
    with rasterio.open(other, "r+") as raster:
        values = raster.read()
        values[:, ~leaf] = np.random.default_rng(0).choice([np.nan, np.inf, 7.0], (5, (~leaf).sum()))
        raster.write(values)
    for name in ("field", "other"):
        reconstruct(model_folder, tmp_path / f"{name}.tif", tmp_path / f"{name}-out.tif", "--tile", 64, "--scale", 1)
    found = read(tmp_path / "field-out.tif")
    assert (tmp_path / "field-out.tif").read_bytes() == (tmp_path / "other-out.tif").read_bytes()
    assert np.isnan(found[:, ~leaf]).all()
    assert np.isfinite(found[:, leaf]).all()


def test_integers_without_nodata_have_a_mask_band_of_the_leaf(model_folder, write_field, tmp_path, monkeypatch):
    """The mask is inside the file, because a file next to it, as old GDAL writes, is easily lost."""
    monkeypatch.setenv("GDAL_TIFF_INTERNAL_MASK", "NO")
    image = write_field(tmp_path / "field.tif", 300, 280)
    reconstruct(model_folder, image, tmp_path / "out.tif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["field.tif", "field_mask.png", "out.tif"]
    leaf = np.asarray(Image.open(tmp_path / "field_mask.png"))
    with rasterio.open(tmp_path / "out.tif") as raster:
        np.testing.assert_array_equal(raster.read_masks(1) > 0, leaf)
        assert not raster.read()[:, ~leaf].any()


def test_without_a_mask_every_pixel_is_reconstructed_with_a_note(model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 64, 64)
    (tmp_path / "field_mask.png").unlink()
    assert "note: no leaf mask: every pixel counts as leaf" in reconstruct(model_folder, image, tmp_path / "out.tif")


def test_swaths_of_a_wide_raster_do_not_change_the_result(model_folder, write_field, tmp_path, monkeypatch):
    image = write_field(tmp_path / "field.tif", 130, 700)
    reconstruct(model_folder, image, tmp_path / "at-once.tif", "--tile", 128)
    monkeypatch.setattr(sliding_window, "MOSAIC_BYTES", 1)
    reconstruct(model_folder, image, tmp_path / "in-runs.tif", "--tile", 128)
    np.testing.assert_array_equal(read(tmp_path / "at-once.tif"), read(tmp_path / "in-runs.tif"))


def test_the_batch_size_changes_integers_by_one_at_most(model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 130, 200)
    for batch_size in (1, 3):
        reconstruct(model_folder, image, tmp_path / f"{batch_size}.tif", "--tile", 64, "--batch-size", batch_size)
    difference = read(tmp_path / "1.tif").astype(int) - read(tmp_path / "3.tif")
    assert np.abs(difference).max() <= 1


def test_an_array_becomes_an_array_with_the_same_axes(model, model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 70, 51)
    np.save(tmp_path / "field.npy", read(image).transpose(1, 2, 0))
    options = ("--axes", "hwc", "--scale", 1e-4)
    output = reconstruct(model_folder, tmp_path / "field.npy", tmp_path / "out.npy", *options)
    assert "note: no wavelengths stated: assumed those of the model" in output
    reconstruct(model_folder, image, tmp_path / "out.tif")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), read(tmp_path / "out.tif").transpose(1, 2, 0))


def test_a_folder_of_images_becomes_a_folder(model_folder, write_field, tmp_path):
    (tmp_path / "fields").mkdir()
    for name in ("a", "b"):
        write_field(tmp_path / "fields" / f"{name}.tif", 64, 64)
    reconstruct(model_folder, tmp_path / "fields", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.tif", "b.tif"]
    assert "is one file for 2 images" in no_reconstruction(model_folder, tmp_path / "fields", tmp_path / "out.tif")


def test_images_of_a_folder_keep_their_names_and_do_not_replace_each_other(model_folder, write_field, tmp_path):
    fields, name = tmp_path / "fields", "DJI_20240612_0001.Field-North.ortho.reflectance.calibrated"
    fields.mkdir()
    for stem in ("plot.7", name):
        write_field(fields / f"{stem}.tif", 64, 64)
    reconstruct(model_folder, fields, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.tif", "plot.7.tif"]
    write_field(fields / "plot.7.tiff", 64, 64)
    reconstruct(model_folder, fields, tmp_path / "both")
    assert len([path for path in (tmp_path / "both").iterdir() if path.name.startswith("fields_plot_7")]) == 2
    assert len(list((tmp_path / "both").iterdir())) == 3


def test_existing_files_are_replaced_only_with_overwrite(model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 64, 64)
    out = tmp_path / "out.tif"
    out.write_text("mine")
    assert "out.tif exists; name another OUT or give --overwrite" in no_reconstruction(model_folder, image, out)
    assert "is also an input image" in no_reconstruction(model_folder, image, image, "--overwrite")
    assert out.read_text() == "mine"
    reconstruct(model_folder, image, out, "--overwrite")
    assert read(out).shape == (5, 64, 64)


def test_a_file_in_the_place_of_the_output_folder_is_an_error(model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 64, 64)
    (tmp_path / "notes").write_text("mine")
    out = tmp_path / "notes" / "out.tif"
    message = no_reconstruction(model_folder, image, out)
    assert message.startswith(f"error: writing {out} failed: ")
    assert f"File exists: '{out.parent}'; free space there or choose another path" in message


def test_a_damaged_raster_is_an_error_and_leaves_no_file(model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 300, 300, compress="deflate")
    content = bytearray(image.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 5000] = bytes(5000)
    image.write_bytes(content)
    assert "field.tif cannot be read" in no_reconstruction(
        model_folder, image, tmp_path / "out" / "field.tif", "--tile", 64
    )
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_an_error_and_leaves_no_file(model_folder, write_field, tmp_path, small_disk):
    image = write_field(tmp_path / "field.tif", 512, 512, "float32")
    assert "free space there or choose another path" in no_reconstruction(model_folder, image, small_disk / "out.tif")
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tile", "100"], "got --tile 100, expected a multiple of 64"),
        (["--device", "cuda:9"], "got --device cuda:9, which is not available"),
        (["--mask", "ndvi>2"], "field.tif has no leaf pixel; give another --mask"),
    ],
)
def test_wrong_options_are_errors_of_one_line(model_folder, write_field, tmp_path, arguments, message):
    image = write_field(tmp_path / "field.tif", 64, 64)
    assert message in no_reconstruction(model_folder, image, tmp_path / "out.tif", *arguments)
    assert not list(tmp_path.glob("*out.tif"))


def test_an_image_without_leaf_is_named_and_the_others_are_written(model_folder, write_field, tmp_path):
    fields = tmp_path / "fields"
    fields.mkdir()
    for name in ("a", "b", "c"):
        write_field(fields / f"{name}.tif", 64, 64)
    Image.new("L", (64, 64)).save(fields / "b_mask.png")
    output = reconstruct(model_folder, fields, tmp_path / "out")
    assert f"{fields / 'b.tif'} has no leaf pixel, so no file was written" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.tif", "c.tif"]


def test_an_out_of_memory_error_names_the_option_to_reduce(model_folder, write_field, tmp_path, monkeypatch):
    def exhausted(*_: object, **__: object) -> torch.Tensor:
        return torch.empty(2**50)

    image = write_field(tmp_path / "field.tif", 64, 64)
    monkeypatch.setattr("msvae.model.autoencoder.AutoencoderKLMultispectralAdapter.decode", exhausted)
    message = no_reconstruction(model_folder, image, tmp_path / "out.tif")
    assert "too little memory on cpu for 1 window of 64 x 64 (" in message
    assert message.endswith("; give a smaller --batch-size or --tile\n")


def test_a_bare_backbone_is_refused(tmp_path, write_field):
    from diffusers import AutoencoderKL

    from msvae.model.build import TINY_BACKBONE

    AutoencoderKL(**TINY_BACKBONE).save_pretrained(tmp_path / "backbone")
    image = write_field(tmp_path / "field.tif", 64, 64)
    assert "holds a AutoencoderKL, expected" in no_reconstruction(tmp_path / "backbone", image, tmp_path / "out.tif")


@pytest.mark.slow
def test_the_hidden_file_of_a_killed_run_is_removed_by_the_next_run(model_folder, write_field, tmp_path):
    image, out = write_field(tmp_path / "field.tif", 900, 900), tmp_path / "out"
    command = [sys.executable, "-m", "msvae", "reconstruct", model_folder, image, out / "field.tif", "--tile", "64"]
    running = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)
    while not list(out.glob(".*")):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    (left,) = out.iterdir()
    assert left.name.startswith(".")
    reconstruct(model_folder, image, out / "field.tif")
    assert [path.name for path in out.iterdir()] == ["field.tif"]


@pytest.mark.parametrize(
    ("dtype", "nodata", "expected"),
    [
        ("uint8", 0, [1, 3, 255]),
        ("uint8", 255, [0, 3, 254]),
        ("int16", None, [-200, 3, 900]),
        ("uint8", 3, [0, 4, 255]),
    ],
)
def test_integers_are_rounded_clipped_and_never_nodata_on_the_leaf(dtype, nodata, expected):
    pixel_format = PixelFormat(None, dtype, (0.01,), (0.0,), dtype, (0.01,), (0.0,), True)
    reflectance, leaf = np.array([[[-2.0, 0.0312, 9.0, np.nan]]], np.float32), np.array([[True, True, True, False]])
    values = leaf_values(reflectance, leaf, pixel_format, None if nodata is None else np.dtype(dtype).type(nodata))
    assert values.dtype == dtype
    assert values[0, 0, :3].tolist() == expected
    assert values[0, 0, 3] == (nodata or 0)


def test_the_area_or_point_tag_is_kept(model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 64, 64)
    with rasterio.open(image, "r+") as raster:
        raster.update_tags(AREA_OR_POINT="Point")
    reconstruct(model_folder, image, tmp_path / "out.tif")
    with rasterio.open(image) as before, rasterio.open(tmp_path / "out.tif") as after:
        assert after.tags()["AREA_OR_POINT"] == "Point"
        assert after.transform == before.transform
