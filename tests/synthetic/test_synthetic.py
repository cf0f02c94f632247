"""Synthetic leaves: published optics, reproducible files, and masks that are exactly the leaf."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from scipy.integrate import quad

from msvae.bands import DEFAULT_NAMES, DEFAULT_WAVELENGTHS_NM
from msvae.synthetic import images
from msvae.synthetic.images import draw_image, synthesise
from msvae.synthetic.leaf_shapes import LEAF_KINDS, draw_leaf, sample_leaves
from msvae.synthetic.prospect import ENTRY_DIFFUSE, EXIT_DIFFUSE, REFRACTIVE_INDEX, leaf_reflectance

BLUE, GREEN, RED, RED_EDGE, NIR = range(5)

# Computed by an independent PROSPECT-D. Contents: N, Cab, Car, Brown, Cw, Cm, Ant.
REFERENCES = [
    ((1.5, 40, 8, 0.0, 0.010, 0.009, 1.0), (0.04196, 0.13535, 0.04514, 0.37147, 0.44225)),
    ((1.8, 10, 4, 0.1, 0.008, 0.006, 0.0), (0.08618, 0.29868, 0.17546, 0.46530, 0.49744)),
    ((2.2, 3, 6, 0.8, 0.003, 0.005, 2.0), (0.07513, 0.16644, 0.26945, 0.43348, 0.52195)),
]


def ndvi(reflectance: np.ndarray) -> np.ndarray:
    return (reflectance[..., NIR] - reflectance[..., RED]) / (reflectance[..., NIR] + reflectance[..., RED])


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthesise(tmp_path_factory.mktemp("made") / "leaves", num_images=6, size_px=96, seed=5)


def read(image: Path) -> tuple[np.ndarray, np.ndarray]:
    with rasterio.open(image) as raster:
        reflectance = np.moveaxis(raster.read(), 0, -1) * np.array(raster.scales)
    return reflectance, np.array(Image.open(image.with_name(f"{image.stem}_mask.png"))) == 255


@pytest.mark.parametrize(("contents", "reflectance"), REFERENCES)
def test_reflectance_agrees_with_an_independent_prospect_d(contents, reflectance):
    np.testing.assert_allclose(leaf_reflectance(*contents), reflectance, atol=1e-3)


def test_contents_may_be_arrays_of_any_shapes_that_broadcast():
    contents = np.array([c for c, _ in REFERENCES])
    maps = [np.broadcast_to(column, (4, 2, 3)) for column in contents.T]
    expected = np.broadcast_to(np.array([r for _, r in REFERENCES]), (4, 2, 3, 5))
    np.testing.assert_allclose(leaf_reflectance(*maps), expected, atol=1e-3)
    assert leaf_reflectance(maps[0], 40, 8, 0, 0.01, 0.009, 1).shape == (4, 2, 3, 5)


def test_diffuse_transmissivity_is_the_integral_of_fresnel_over_all_directions():
    for n, entry in zip(REFRACTIVE_INDEX, ENTRY_DIFFUSE, strict=True):

        def transmitted(theta: float, n: float = n) -> float:
            refracted = np.arcsin(np.sin(theta) / n)
            s = (np.cos(theta) - n * np.cos(refracted)) / (np.cos(theta) + n * np.cos(refracted))
            p = (n * np.cos(theta) - np.cos(refracted)) / (n * np.cos(theta) + np.cos(refracted))
            return (1 - (s**2 + p**2) / 2) * np.sin(2 * theta)

        assert entry == pytest.approx(quad(transmitted, 0, np.pi / 2)[0], abs=1e-5)
    np.testing.assert_allclose(EXIT_DIFFUSE, ENTRY_DIFFUSE / REFRACTIVE_INDEX**2)


def test_reflectance_is_finite_without_absorption_and_with_extreme_absorption():
    clear = leaf_reflectance([1.0, 1.5, 3.0], 0, 0, 0, 0, 0, 0)
    opaque = leaf_reflectance([1.0, 1.5, 3.0], 1e5, 1e5, 1e5, 10, 10, 1e5)
    assert np.isfinite(clear).all() and np.isfinite(opaque).all()
    assert (np.diff(clear, axis=0) > 0).all() and (clear < 1).all()
    assert (opaque < 0.06).all()


def test_same_seed_gives_the_same_bytes(series, tmp_path):
    again = synthesise(tmp_path / "again", num_images=6, size_px=96, seed=5)
    for first, second in zip(sorted(series[0].parent.iterdir()), sorted(again[0].parent.iterdir()), strict=True):
        assert first.name == second.name and first.read_bytes() == second.read_bytes()
    other = synthesise(tmp_path / "other", num_images=1, size_px=96, seed=6)
    assert other[0].read_bytes() != series[0].read_bytes()


def test_an_image_does_not_depend_on_how_many_are_made(series, tmp_path):
    fewer = synthesise(tmp_path / "fewer", num_images=2, size_px=96, seed=5)
    assert [path.name for path in fewer] == ["leaf_000.tif", "leaf_001.tif"]
    assert [path.read_bytes() for path in fewer] == [path.read_bytes() for path in series[:2]]


def test_every_image_stores_band_names_wavelengths_and_scale(series):
    for image in series:
        with rasterio.open(image) as raster:
            assert raster.descriptions == DEFAULT_NAMES
            assert raster.scales == (1e-4,) * 5
            assert (raster.dtypes, raster.shape) == (("uint16",) * 5, (96, 96))
            tags = [raster.tags(band) for band in raster.indexes]
        assert tuple(float(tag["wavelength"]) for tag in tags) == DEFAULT_WAVELENGTHS_NM
        assert {tag["wavelength_units"] for tag in tags} == {"nm"}


def test_mask_is_8_bit_with_255_for_leaf_and_0_for_soil(series):
    for image in series:
        mask = Image.open(image.with_name(f"{image.stem}_mask.png"))
        assert (mask.mode, mask.size) == ("L", (96, 96))
        assert set(np.unique(np.array(mask))) == {0, 255}


def test_mask_and_spectra_agree_on_what_is_leaf(series):
    """Soil is never as green as a leaf. Pixels near the leaf mix both and are left out."""
    for image in series:
        reflectance, leaf_mask = read(image)
        near_leaf = np.zeros_like(leaf_mask)
        for shift in [(i, j) for i in range(-3, 4) for j in range(-3, 4)]:
            near_leaf |= np.roll(leaf_mask, shift, axis=(0, 1))
        assert np.median(ndvi(reflectance[leaf_mask])) > 0.4
        assert np.quantile(ndvi(reflectance[~near_leaf]), 0.99) < 0.3


def test_leaf_pixels_are_free_of_soil(monkeypatch):
    """On black ground, with the same light, noise and shadow, leaf pixels are unchanged and the others are darker."""
    reflectance, leaf_mask = draw_image(96, seed=5, index=0)
    draw_soil = images.draw_soil
    monkeypatch.setattr(images, "draw_soil", lambda *args: 0 * draw_soil(*args))
    on_black, leaf_mask_on_black = draw_image(96, seed=5, index=0)
    assert (leaf_mask == leaf_mask_on_black).all()
    assert (reflectance[leaf_mask] == on_black[leaf_mask]).all()
    assert (reflectance[~leaf_mask] > on_black[~leaf_mask]).mean() > 0.9


def test_healthy_leaf_has_a_green_peak_a_red_trough_and_a_plateau():
    medians = np.array(
        [np.median(image[leaf_mask], axis=0) for image, leaf_mask in (draw_image(64, 1, i) for i in range(20))]
    )
    blue, green, red, red_edge, nir = np.median(medians, axis=0)
    assert blue < green > red
    assert red_edge > 2 * green
    assert nir == pytest.approx(0.46, abs=0.06)
    assert (medians[:, NIR] > medians[:, RED_EDGE]).all()


@pytest.mark.parametrize("size_px", [64, 100, 256])
def test_leaves_cover_a_quarter_to_two_thirds_of_every_image(size_px):
    for index in range(12):
        reflectance, leaf_mask = draw_image(size_px, seed=2, index=index)
        assert reflectance.shape == (size_px, size_px, 5) and leaf_mask.shape == (size_px, size_px)
        assert 0.25 < leaf_mask.mean() < 0.68


def test_every_resolution_shows_the_same_leaf():
    """The centre of a pixel at 64 px is the centre of the middle one of 3 x 3 pixels at 192 px."""
    num_leaves = 0
    for seed in range(30):
        for leaf in sample_leaves(np.random.default_rng(seed)):
            assert (draw_leaf(leaf, 64).inside == draw_leaf(leaf, 192).inside[1::3, 1::3]).all()
            num_leaves += 1
    assert num_leaves > len(LEAF_KINDS)


def test_on_image_is_called_once_per_image(tmp_path):
    calls = []
    synthesise(tmp_path / "out", num_images=3, size_px=64, seed=0, on_image=lambda: calls.append(1))
    assert len(calls) == 3


def test_an_interrupted_series_leaves_nothing_behind(tmp_path):
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise(tmp_path / "out", num_images=3, size_px=64, seed=0, on_image=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_in_use_is_refused_and_unchanged(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "field_notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"out is in use, expected a new or empty folder") as error:
        synthesise(tmp_path / "out", num_images=1, size_px=64, seed=0)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "field_notes.txt"]
    with pytest.raises(ValueError, match="in use"):
        synthesise(tmp_path / "out" / "field_notes.txt", num_images=1, size_px=64, seed=0)


def test_an_empty_output_folder_is_filled(tmp_path):
    made = synthesise(tmp_path, num_images=1, size_px=64, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leaf_000.tif", "leaf_000_mask.png"]
    assert made == [tmp_path / "leaf_000.tif"]


def test_an_output_that_cannot_be_written_raises_a_one_line_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file/out \(File exists: .*file\)") as error:
        synthesise(tmp_path / "file" / "out", num_images=1, size_px=64, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("num_images", "size_px", "seed", "message"),
    [(0, 64, 0, "got 0 images"), (1, 63, 0, "size of 63 px"), (1, 64, -1, "seed -1")],
)
def test_arguments_out_of_range_are_refused(tmp_path, num_images, size_px, seed, message):
    with pytest.raises(ValueError, match=message):
        synthesise(tmp_path / "out", num_images, size_px, seed)
    assert not (tmp_path / "out").exists()
