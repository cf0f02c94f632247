"""Matching of the bands of an image with those of a model, and errors if they do not match."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import rasterio

from .conftest import no_reconstruction, read, reconstruct

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def test_bands_are_matched_by_wavelength_and_an_error_names_both_sides(model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 64, 64)
    with rasterio.open(image) as before:
        values, profile = before.read(), before.profile
    order = [4, 0, 0, 3, 1, 2]
    stated = [850.0, 475.0, 400.0, 731.0, 540.0, 650.0]
    profile.update(count=6)
    for name, wavelengths in (("mixed", stated), ("other", [nm + 100 for nm in stated])):
        with rasterio.open(tmp_path / f"{name}.tif", "w", **profile) as raster:
            raster.write(values[order])
            raster.scales = (1e-4,) * 6
            for band, nm in enumerate(wavelengths, start=1):
                raster.update_tags(band, wavelength=str(nm), wavelength_units="nm")
        shutil.copy(tmp_path / "field_mask.png", tmp_path / f"{name}_mask.png")
    reconstruct(model_folder, image, tmp_path / "out.tif")
    reconstruct(model_folder, tmp_path / "mixed.tif", tmp_path / "mixed-out.tif")
    np.testing.assert_array_equal(read(tmp_path / "mixed-out.tif"), read(tmp_path / "out.tif"))
    message = no_reconstruction(model_folder, tmp_path / "other.tif", tmp_path / "other-out.tif")
    assert "other.tif holds 6 bands (950, 575, 500, 831, 640, 750 nm)" in message
    assert "the model expects 5 bands (475, 539, 651, 731, 851 nm)" in message
    assert not list(tmp_path.glob("*other-out.tif"))


COLOURS = ("blue", "green", "red", "red_edge", "nir")


@pytest.mark.parametrize("spelled", [COLOURS, ("Blue", "Green", "Red", "RedEdge", "NIR")])
def test_bands_are_matched_by_name_if_an_image_states_no_wavelengths(model_folder, tmp_path, spelled):
    stored = np.random.default_rng(4).integers(300, 5000, (5, 40, 40), dtype=np.uint16)
    for path, names, order in (("as_model.tif", COLOURS, range(5)), ("turned.tif", spelled, range(4, -1, -1))):
        shape = {"driver": "GTiff", "count": 5, "height": 40, "width": 40, "dtype": "uint16", "nodata": 0}
        with rasterio.open(tmp_path / path, "w", **shape) as raster:
            raster.write(stored[list(order)])
            raster.scales = (1e-4,) * 5
            raster.descriptions = tuple(names[i] for i in order)
    written = []
    for name in ("as_model.tif", "turned.tif"):
        reconstruct(model_folder, tmp_path / name, tmp_path / f"r-{name}")
        written.append(read(tmp_path / f"r-{name}"))
    np.testing.assert_array_equal(*written)


def test_an_image_that_names_other_bands_than_the_model_is_refused(model_folder, write_field, tmp_path):
    image = write_field(tmp_path / "field.tif", 40, 40)
    with rasterio.open(image, "r+") as raster:
        for band, name in enumerate(("B2", "B3", "B4", "B5", "B8"), start=1):
            raster.set_band_description(band, name)
            raster.update_tags(band, wavelength="", wavelength_units="")
    message = no_reconstruction(model_folder, image, tmp_path / "out.tif")
    assert "holds 5 bands (B2, B3, B4, B5, B8), the model expects" in message
    assert message.endswith("give --wavelengths of all its bands, in their order\n")
