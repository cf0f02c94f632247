"""Every error is one line that names the file and the fix, and leaves no files behind."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio.shutil
from rasterio.transform import Affine, from_origin

from msvae.packing import pack as job
from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.shards.writer import ShardWriter

FIVE_NM = (475.0, 560.0, 668.0, 717.0, 840.0)


def refuse(images, out, match, **options):
    """Check that packing fails with one line that matches, and changes no file."""
    around = next(folder for folder in out.parents if folder.is_dir())
    before = sorted(around.rglob("*"))
    with pytest.raises(ValueError, match=match) as caught:
        pack(images, out, PackOptions(**({"tile_px": 16} | options)))
    assert "\n" not in str(caught.value)
    assert sorted(around.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tile_px": 100}, "--tile 100, expected a multiple of 8.*give (96|104)"),
        ({"tile_px": 0}, "multiple of 8"),
        ({"min_coverage": 1.5}, "--min-coverage 1.5"),
        ({"split": (0.7, 0.2, 0.2)}, "add up to 1"),
        ({"split": (0, 0.5, 0.5)}, "the first above 0"),
        ({"split": (1.2, -0.1, -0.1)}, "three shares"),
        ({"split": (0.7, 0.3)}, "--split 0.7 0.3, expected more values"),
        ({"split_by": "field"}, "expected auto, image or block"),
        ({"scale": 0.0}, "--scale 0, "),
        ({"scale": float("nan")}, "--scale nan"),
        ({"scale": 10_000.0}, "--scale 10000, expected .* at most 10; give 0.0001"),
        ({"offset": float("inf")}, "--offset inf"),
        ({"tolerance_nm": -1.0}, "--tolerance-nm -1"),
        ({"axes": "xyz"}, "--axes xyz, expected the letters c, h and w"),
        ({"axes": "hhw"}, "--axes hhw"),
        ({"axes": "hwc", "band_files": ("a.tif",)}, "--axes hwc with --band-files"),
        ({"bands": ("1", "1")}, "--bands 1,1, expected different bands"),
        ({"mask": "ndvi>0", "mask_files": "{stem}.png"}, "--mask ndvi>0 and --mask-files"),
        ({"min_object_px": -1}, "--min-object-px -1"),
        ({"erode_px": -1}, "--erode-px -1"),
        ({"block_tiles": 0}, "block_tiles 0, expected 1 or more"),
        ({"tile": 128}, "option tile is unknown, expected one of .*tile_px"),
        ({"tile_px": "large"}, "--tile large, expected a valid integer"),
        ({"tiles_per_shard": 0}, "tiles_per_shard 0"),
        ({"wavelengths_nm": ()}, "--wavelengths"),
        ({"wavelengths_nm": (475, 475)}, "a distinct wavelength"),
        ({"wavelengths_nm": (0.475,)}, "in nm"),
        ({"wavelengths_nm": (475,), "band_files": ("a.tif", "b.tif")}, "2 band files but 1 wavelength"),
    ],
)
def test_invalid_options_are_refused_in_one_line(options, match):
    with pytest.raises(ValueError, match=match) as caught:
        PackOptions(**options)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_inputs_are_named(tmp_path, leaf_image):
    out, image = tmp_path / "out", leaf_image(tmp_path / "leaf.tif")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").touch()
    (tmp_path / "text.tif").write_text("not a raster")
    (tmp_path / "lone.hdr").touch()
    refuse([], out, "got no images")
    refuse([tmp_path / "none.tif"], out, "none.tif does not exist")
    refuse([tmp_path / "empty"], out, "empty holds no raster.*it holds nothing")
    refuse([tmp_path / "notes"], out, "notes holds no raster.*readme.txt")
    refuse([tmp_path / "text.tif"], out, "text.tif cannot be opened")
    refuse([tmp_path / "lone.hdr"], out, "lone.hdr is a header whose data file is missing")
    refuse([image, tmp_path / "." / "leaf.tif"], out, "leaf.tif is named 2 times")


def test_band_files_that_do_not_fit_together_are_named(tmp_path, write_raster, on_earth):
    out, plane = tmp_path / "out", np.ones((1, 16, 16), np.uint16)
    folder = tmp_path / "plot"
    write_raster(folder / "red.tif", plane, None, **on_earth)
    write_raster(folder / "small.tif", plane[:, :8], None, **on_earth)
    write_raster(folder / "bytes.tif", plane.astype(np.uint8), None, **on_earth)
    shifted = on_earth | {"transform": on_earth["transform"] @ type(on_earth["transform"]).translation(3, 4)}
    write_raster(folder / "shifted.tif", plane, None, **shifted)
    write_raster(folder / "elsewhere.tif", plane, None, **(on_earth | {"crs": "EPSG:32644"}))
    nm = {"wavelengths_nm": (668, 840), "mask": "ndvi>0"}
    refuse([folder], out, "plot lacks band file nir.tif.*it holds", band_files=("red.tif", "nir.tif"), **nm)
    refuse([folder / "red.tif"], out, "red.tif is a file", band_files=("red.tif", "nir.tif"), **nm)
    refuse([folder], out, "small.tif has 8 x 16 px but .*16 x 16", band_files=("red.tif", "small.tif"), **nm)
    refuse([folder], out, "another grid .*off by 5.00 px", band_files=("red.tif", "shifted.tif"), **nm)
    refuse([folder], out, "another grid .*EPSG:32644", band_files=("red.tif", "elsewhere.tif"), **nm)
    refuse([folder], out, "plot holds uint16, uint8", band_files=("red.tif", "bytes.tif"), **nm)


def test_bands_that_cannot_be_selected_are_named(tmp_path, write_raster):
    out = tmp_path / "out"

    def image(name, count, wavelengths_nm=None, **options):
        return write_raster(tmp_path / name, np.ones((count, 16, 16), np.uint16), wavelengths_nm, **options)

    four = image("four.tif", 4, FIVE_NM[:4], names=("blue", "green", "red", "edge"))
    bare = image("bare.tif", 4)
    five = image("five.tif", 5, FIVE_NM)
    some = image("some.tif", 5, FIVE_NM[:3])
    odd = image("odd.tif", 5, FIVE_NM, units="cm-1")
    mask = {"mask": "ndvi>0"}
    refuse(
        [four], out, r"holds 4 bands \(475, 560, 668, 717 nm\) but none.*840 nm.*717", wavelengths_nm=FIVE_NM, **mask
    )
    refuse([bare], out, r"bare.tif holds 4 bands .*but 5 bands are needed", wavelengths_nm=FIVE_NM, **mask)
    refuse([bare], out, "states no wavelengths; give --wavelengths", **mask)
    refuse([five], out, "both 480 and 470 nm are nearest", wavelengths_nm=(480, 470), **mask)
    refuse([some], out, "states a wavelength for 3 of its 5 bands", **mask)
    refuse([odd], out, "band 1 states wavelength '475.0' in 'cm-1'", **mask)
    refuse([five, four], out, r"four.tif holds 4 bands \(.*\) but the first image 5 bands", **mask)
    refuse([five, bare], out, "bare.tif does not state wavelengths but the first image does", **mask)
    refuse([four], out, "--mask ndvi needs nir and red", **mask)


def test_types_and_scales_that_differ_are_named(tmp_path, write_raster):
    out = tmp_path / "out"

    def image(name, dtype, **options):
        return write_raster(tmp_path / name, np.ones((5, 16, 16), dtype), **options)

    mask = {"mask": "ndvi>0"}
    refuse([image("long.tif", "uint32")], out, "long.tif holds uint32 and states no scale", **mask)
    refuse([image("signed.tif", "int16")], out, "signed.tif holds int16 and states no scale", **mask)
    words = image("words.tif", "uint16", scale=0.0001)
    refuse([words, image("bytes.tif", "uint8", scale=0.0001)], out, "bytes.tif holds uint8 but .*uint16", **mask)
    refuse([words, image("other.tif", "uint16", scale=0.001)], out, "other.tif states scale", **mask)


def test_missing_and_misfitting_masks_are_named(tmp_path, leaf_image, write_raster):
    out = tmp_path / "out"
    refuse([leaf_image(tmp_path / "a.tif", mask=None)], out, "a.tif has no leaf mask.*put a mask file.*--mask")
    floats = write_raster(tmp_path / "b.tif", np.ones((5, 16, 16), np.float32))
    refuse([floats], out, "b.tif has no leaf mask")
    wrong = leaf_image(tmp_path / "c.tif", mask=np.ones((32, 64), bool))
    refuse([wrong], out, "c_mask.png has 32 x 64 px but .*64 x 64")
    refuse([wrong], out, r"otsu\(\) needs one quantity.*expected auto", mask="otsu")
    photo = leaf_image(tmp_path / "e.tif", mask=None, nodata=0)
    for ending in ("npy", "jpg"):
        (tmp_path / f"e_mask.{ending}").touch()
    refuse([photo], out, "e.tif has e_mask.jpg, e_mask.npy next to it, expected a mask that ends in .png, .tif, .tiff")
    broken = leaf_image(tmp_path / "d.tif", size_px=128)
    mask = tmp_path / "d_mask.png"
    mask.write_bytes(mask.read_bytes()[:1000])
    refuse([broken], out, "mask .*d_mask.png cannot be read")


def test_a_mask_on_another_grid_than_its_image_is_named(tmp_path, leaf_image, write_raster, on_earth):
    image = leaf_image(tmp_path / "a.tif", mask=None, **on_earth)
    south_up = Affine(0.02, 0, 578_000, 0, 0.02, 3_419_000 - 64 * 0.02)
    for georeference, off in (
        ({"transform": from_origin(578_000.06, 3_418_999.92, 0.02, 0.02)}, "off by 5.00 px"),
        ({"transform": from_origin(578_000, 3_419_000, 0.03, 0.03)}, "off by 32.00 px"),
        ({"transform": south_up}, "off by 64.00 px"),
        ({"crs": "EPSG:32644"}, "off by 0.00 px, EPSG:32644 and EPSG:32643"),
    ):
        write_raster(tmp_path / "a_mask.tif", np.ones((1, 64, 64), np.uint8), None, **(on_earth | georeference))
        refuse([image], tmp_path / "out", f"mask .*a_mask.tif is on another grid than .*a.tif .*{off}.*rio warp")


def test_a_dataset_without_tiles_is_refused_with_the_reasons(tmp_path, leaf_image):
    empty = leaf_image(tmp_path / "empty.tif", mask=np.zeros((64, 64), bool))
    small = leaf_image(tmp_path / "small.tif", size_px=8)
    refuse(
        [empty, small],
        tmp_path / "new" / "folders" / "out",
        "no tile left.*2 images, dropped 16 coverage below 0.10, 1 image smaller than a tile; lower --min-cov",
    )


@pytest.mark.parametrize("driver", ["GTiff", "COG", "ENVI", "HFA"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_rasters_are_never_packed(tmp_path, write_raster, driver, share):
    values = np.random.default_rng(7).integers(1, 10_000, (5, 256, 256), dtype=np.uint16)
    ending = {"ENVI": "dat", "HFA": "img"}.get(driver, "tif")
    image = write_raster(
        tmp_path / f"cut.{ending}", values, scale=0.0001, driver="GTiff" if driver == "COG" else driver
    )
    if driver == "COG":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rasterio.shutil.copy(image, tmp_path / "cog.tif", driver="COG", compress="lzw")
        shutil.move(tmp_path / "cog.tif", image)
    content = image.read_bytes()
    image.write_bytes(content[: int(len(content) * share)])
    refuse([image], tmp_path / "out", f"cut.{ending} ", mask="ndvi<1", wavelengths_nm=FIVE_NM)


def test_existing_data_is_replaced_only_with_overwrite(tmp_path, leaf_image):
    out, image = tmp_path / "out", leaf_image(tmp_path / "leaf.tif")
    out.mkdir()
    first = pack([image], out, PackOptions(tile_px=16))
    refuse([image], out, "exists and is not empty.*--overwrite")
    second = pack([image], out, PackOptions(tile_px=8, overwrite=True))
    assert sum(second.tiles.values()) > sum(first.tiles.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leaf.tif", "leaf_mask.png", "out"]


def test_overwrite_never_deletes_files_that_packing_did_not_write(tmp_path, leaf_image):
    image = leaf_image(tmp_path / "photos" / "leaf.tif")
    refuse([image], tmp_path / "photos", "would delete leaf.tif, leaf_mask.png", overwrite=True)
    inside = leaf_image(tmp_path / "data" / "train" / "leaf.tif")
    refuse([inside], tmp_path / "data", "would delete train/leaf.tif", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    refuse([image], tmp_path / "home", "would delete thesis.txt", overwrite=True)
    numbered = leaf_image(tmp_path / "plants" / "train" / "leaf-000001.tif")
    refuse([image], tmp_path / "plants", "would delete train/leaf-000001.tif", overwrite=True)
    assert image.exists() and inside.exists() and numbered.exists()


def test_packing_needs_no_hard_links(tmp_path, leaf_image, read_tars, monkeypatch):
    """exFAT and many network file systems have none."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    image = leaf_image(tmp_path / "leaf.tif")
    monkeypatch.setattr(os, "link", refused)
    pack([image], tmp_path / "out", PackOptions(tile_px=8))
    assert read_tars(tmp_path / "out" / "train")
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_cannot_be_written_is_refused_before_any_pixel_is_read(tmp_path, leaf_image, monkeypatch):
    image = leaf_image(tmp_path / "leaf.tif")
    (tmp_path / "file").touch()
    monkeypatch.setattr(job, "describe_images", lambda *_: pytest.fail("an image was opened"))
    refuse([image], tmp_path / "file", "is a file; name a folder")
    refuse([image], tmp_path / "file" / "out", r"cannot write .*file/out \(File exists: .*file\)")
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    refuse([image], tmp_path / "mount", "is a mount point")


@pytest.mark.parametrize(
    ("thrown", "seen"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), ValueError)],
)
def test_an_interrupted_overwrite_leaves_exactly_the_earlier_data(tmp_path, leaf_image, monkeypatch, thrown, seen):
    out, image = tmp_path / "out", leaf_image(tmp_path / "leaf.tif")
    pack([image], out, PackOptions(tile_px=16))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    write, written = ShardWriter.write, []

    def fail_at_the_fifth(self, *sample):
        written.append(sample)
        if len(written) == 5:
            raise thrown
        write(self, *sample)

    monkeypatch.setattr(ShardWriter, "write", fail_at_the_fifth)
    with pytest.raises(seen, match="No space left" if seen is ValueError else None):
        pack([image], out, PackOptions(tile_px=8, overwrite=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leaf.tif", "leaf_mask.png", "out"]


def test_warnings_of_gdal_are_not_shown(tmp_path, leaf_image, capfd):
    image = leaf_image(tmp_path / "leaf.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack([image], tmp_path / "out", PackOptions(tile_px=16))
    assert capfd.readouterr() == ("", "")
