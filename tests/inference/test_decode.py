"""`msvae decode`: decoding latents into reflectance."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import rasterio
import torch
from diffusers import AutoencoderKL

from msvae import AutoencoderKLMultispectralAdapter
from msvae.inference.decode import decode
from msvae.model.build import TINY_BACKBONE
from msvae.shards.latents import LATENTS_ENDING
from msvae.shards.manifest import Shards
from msvae.shards.sample_codec import encode_mask, npy_header
from msvae.shards.writer import ShardWriter

from .conftest import refused, run, samples


def test_decoded_shards_are_valid_and_equal_the_decoder(latents, leaf_shards, tmp_path):
    run("decode", latents / "model", latents, tmp_path / "tiles")
    assert "val: sound" in run("verify", tmp_path / "tiles")
    model = AutoencoderKLMultispectralAdapter.from_pretrained(latents / "model")
    tiles, moments = samples(tmp_path / "tiles" / "val"), samples(latents / "val")
    assert list(tiles) == list(moments)
    for key, sample in moments.items():
        with torch.no_grad():
            expected = model.decode(torch.from_numpy(sample["latents.npy"][None, :16])).sample[0].numpy()
        np.testing.assert_allclose(tiles[key]["bands.npy"], expected, atol=1e-5)
        np.testing.assert_array_equal(tiles[key]["mask.png"], sample["mask.png"])


@pytest.mark.parametrize(("inside", "given", "becomes"), [("train/notes", "..", "train"), ("val", ".", "val")])
def test_a_split_keeps_its_name_for_any_relative_path(latents, tmp_path, monkeypatch, inside, given, becomes):
    shutil.copytree(latents, tmp_path / "latents")
    (tmp_path / "latents" / "train" / "notes").mkdir()
    monkeypatch.chdir(tmp_path / "latents" / inside)
    run("decode", latents / "model", given, tmp_path / "tiles")
    assert [path.name for path in (tmp_path / "tiles").iterdir()] == [becomes]
    assert samples(tmp_path / "tiles" / becomes).keys() == samples(latents / becomes).keys()


def test_memory_stays_flat_as_a_tar_of_latents_grows(latents, tmp_path, monkeypatch):
    """A sample has 50 kB, and its index entry less than 1 kB. The model is replaced by a stub."""
    tile_px, cells, peaks = 128, 16, []
    array = np.zeros((32, cells, cells), "<f4")
    member = LATENTS_ENDING, npy_header(array.shape, array.dtype) + array.tobytes()
    leaf = encode_mask(np.ones((tile_px, tile_px), bool))
    monkeypatch.setattr(
        "msvae.model.autoencoder.AutoencoderKLMultispectralAdapter.decode",
        lambda _, z, **__: (torch.zeros(len(z), 5, tile_px, tile_px),),
    )
    for number in (16, 160):
        folder = tmp_path / str(number)
        folder.mkdir()
        with ShardWriter(folder / "a.tar") as writer:
            for key in range(number):
                writer.append(str(key), member, leaf, b"{}")
        stated = json.loads((latents / "train" / "manifest.json").read_text())
        stated |= {"cells": cells, "tile_px": tile_px, "shards": Shards.of([writer.entry]).model_dump()}
        (folder / "manifest.json").write_text(json.dumps(stated))
        tracemalloc.start()
        decode(str(latents / "model"), str(folder), tmp_path / f"{number}-tiles", device="cpu")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000, peaks


def test_shards_are_refused_by_a_model_that_did_not_encode_them(latents, other_model, tmp_path):
    message = refused("decode", other_model, latents, tmp_path / "tiles")
    assert "was encoded by another model than" in message
    assert not (tmp_path / "tiles").exists()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_latents_of_a_diffusion_model_become_geotiffs(latents, tmp_path):
    model = AutoencoderKLMultispectralAdapter.from_pretrained(latents / "model")
    z = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "drawn.npy", ((z - model.config.shift_factor) * model.config.scaling_factor).numpy())
    np.save(tmp_path / "plain.npy", z.numpy())
    run("decode", latents / "model", tmp_path / "drawn.npy", tmp_path / "drawn")
    run("decode", latents / "model", tmp_path / "plain.npy", tmp_path / "plain", "--unscaled")
    with torch.no_grad():
        expected = model.decode(z).sample.numpy()
    for name in ("drawn", "plain"):
        for number in range(3):
            with rasterio.open(tmp_path / name / f"{name}-{number:04d}.tif") as raster:
                np.testing.assert_allclose(raster.read(), expected[number], atol=1e-4)
                assert [raster.tags(band)["wavelength"] for band in (1, 5)] == ["474.73", "850.59"]
    np.save(tmp_path / "wrong.npy", np.zeros((1, 4, 8, 8), np.float32))
    message = refused("decode", latents / "model", tmp_path / "wrong.npy", tmp_path / "wrong")
    assert "float32 of shape (1, 4, 8, 8), expected floats (B, 16, h, w)" in message


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_half_precision_latents_decode_as_the_same_values_in_single_precision(latents, tmp_path):
    half = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).numpy().astype(np.float16)
    decoded = []
    for name, drawn in (("half", half), ("single", half.astype(np.float32))):
        np.save(tmp_path / f"{name}.npy", drawn)
        run("decode", latents / "model", tmp_path / f"{name}.npy", tmp_path / name)
        with rasterio.open(tmp_path / name / f"{name}-0000.tif") as raster:
            decoded.append(raster.read())
    np.testing.assert_array_equal(*decoded)


@pytest.mark.parametrize(
    "of_backbone", [{"scaling_factor": 1.0, "shift_factor": 0.0}, {"scaling_factor": 1.5305, "shift_factor": 0.0609}]
)
def test_latents_of_a_diffusion_model_are_not_unscaled_by_the_factors_of_a_backbone(of_backbone, tmp_path):
    AutoencoderKL(**{**TINY_BACKBONE, **of_backbone}).save_pretrained(tmp_path / "backbone")
    AutoencoderKLMultispectralAdapter.from_pretrained(tmp_path / "backbone").save_pretrained(tmp_path / "best")
    np.save(tmp_path / "drawn.npy", np.zeros((1, 16, 4, 4), np.float32))
    message = refused("decode", tmp_path / "best", tmp_path / "drawn.npy", tmp_path / "out")
    assert "name the model in the folder model/ of `msvae encode`" in message
    assert "--unscaled" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be opened (No data left in file); save a numeric array with numpy.save"),
        (b"PK\x03\x04 cut short", "cannot be opened (File is not a zip file); save a numeric array"),
        (None, "is an archive of arrays; save a single one with numpy.save"),
    ],
)
def test_a_file_that_is_not_an_array_is_an_error(latents, tmp_path, content, message):
    file = tmp_path / "drawn.npy"
    if content is None:
        np.savez(tmp_path / "drawn.npz", np.zeros((1, 16, 4, 4), np.float32))
        (tmp_path / "drawn.npz").rename(file)
    else:
        file.write_bytes(content)
    assert f"drawn.npy {message}" in refused("decode", latents / "model", file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
