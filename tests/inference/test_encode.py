"""`msvae encode` and `decode`: shards of latents, the factors for diffusion, and the way back."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from typer.testing import CliRunner

from msvae import AutoencoderKLMultispectralAdapter
from msvae.cli import app
from msvae.shards.latents import LatentReader

from ..conftest import ROOT


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2, done.output
    assert done.output.count("\n") == 1
    return done.output


def samples(folder: Path) -> dict[str, dict[str, Any]]:
    """All members by `tarfile` alone."""
    decode = {"npy": lambda raw: np.load(io.BytesIO(raw)), "png": lambda raw: np.asarray(Image.open(io.BytesIO(raw)))}
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, ending = member.name.split(".", 1)
                content = tar.extractfile(member).read()
                found.setdefault(key, {})[ending] = decode.get(ending.split(".")[-1], json.loads)(content)
    return found


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def latents(model_folder, leaf_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "leaves"
    run("encode", model_folder, leaf_shards, out)
    return out


def test_latents_are_the_posterior_of_each_tile_beside_its_mask_and_json(model, leaf_shards, latents):
    for split in ("train", "val", "test"):
        tiles, encoded = samples(leaf_shards / split), samples(latents / split)
        scale = json.loads((leaf_shards / split / "manifest.json").read_text())["scale"][0]
        assert list(tiles) == list(encoded)
        for key, tile in tiles.items():
            np.testing.assert_array_equal(encoded[key]["mask.png"], tile["mask.png"])
            assert encoded[key]["json"] == tile["json"]
            reflectance = torch.from_numpy(tile["bands.npy"].astype(np.float32) * np.float32(scale))[None]
            mask = torch.from_numpy(tile["mask.png"] > 0)[None, None]
            with torch.no_grad():
                posterior = model.encode(reflectance, mask=mask).latent_dist
            expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0].numpy()
            np.testing.assert_allclose(encoded[key]["latents.npy"], expected, atol=1e-4)


def test_factors_are_mean_and_spread_over_leaf_cells_of_the_training_split(latents, model_folder):
    """Draws from the posterior have the variance of its means plus its own."""
    weights, values, squares = [], [], []
    for sample in samples(latents / "train").values():
        mean, logvar = np.split(sample["latents.npy"].astype(np.float64), 2)
        share = (sample["mask.png"] > 0).reshape(4, 8, 4, 8).mean(axis=(1, 3))
        weights.append(np.broadcast_to(share, mean.shape))
        values.append(mean)
        squares.append(mean**2 + np.exp(logvar))
    w, v, s = (np.stack(parts) for parts in (weights, values, squares))
    shift = (w * v).sum() / w.sum()
    std = np.sqrt((w * s).sum() / w.sum() - shift**2)
    config = json.loads((latents / "model" / "config.json").read_text())
    assert config["shift_factor"] == pytest.approx(shift, rel=1e-9)
    assert config["scaling_factor"] == pytest.approx(1 / std, rel=1e-9)
    assert json.loads((model_folder / "config.json").read_text())["scaling_factor"] == 1.0
    for split in ("train", "val", "test"):
        manifest = json.loads((latents / split / "manifest.json").read_text())
        assert (manifest["format"], manifest["scaling_factor"]) == ("msvae-latents", config["scaling_factor"])


def test_the_model_beside_them_is_complete(latents, model, leaf_shards):
    again = AutoencoderKLMultispectralAdapter.from_pretrained(latents / "model")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_samples_depend_on_seed_and_key_alone(model_folder, leaf_shards, latents, tmp_path):
    for name, split, seed in (("a", "", 1), ("b", "val", 1), ("c", "val", 2)):
        run("encode", model_folder, leaf_shards / split, tmp_path / name, "--kind", "sample", "--seed", seed)
    a, b, c = (samples(tmp_path / name / "val") for name in "abc")
    moments = samples(latents / "val")
    drawn = []
    for key, sample in a.items():
        np.testing.assert_array_equal(sample["latents.npy"], b[key]["latents.npy"])
        assert not np.array_equal(sample["latents.npy"], c[key]["latents.npy"])
        mean, logvar = np.split(moments[key]["latents.npy"], 2)
        drawn.append((sample["latents.npy"] - mean) / np.exp(0.5 * logvar))
    noise = np.stack(drawn)
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 4 / np.sqrt(noise.size)


def test_half_precision_rounds_and_keeps_the_factors(model_folder, leaf_shards, latents, tmp_path):
    run("encode", model_folder, leaf_shards, tmp_path / "half", "--dtype", "float16")
    exact, half = samples(latents / "val"), samples(tmp_path / "half" / "val")
    for key, sample in half.items():
        np.testing.assert_array_equal(sample["latents.npy"], exact[key]["latents.npy"].astype(np.float16))
    factors = [json.loads((out / "model" / "config.json").read_text()) for out in (latents, tmp_path / "half")]
    assert factors[0]["scaling_factor"] == factors[1]["scaling_factor"]


def test_a_data_set_for_torch_gives_every_sample_and_notices_damage(latents, tmp_path):
    reader = LatentReader(latents / "train")
    expected = samples(latents / "train")
    assert [sample.key for sample in reader] == list(expected)
    for sample in reader:
        np.testing.assert_array_equal(sample.latents, expected[sample.key]["latents.npy"])
    copy = tmp_path / "train"
    copy.mkdir()
    for name, content in every_byte(latents / "train").items():
        (copy / name).write_bytes(content)
    tar = copy / "leaf-000000.tar"
    whole = tar.read_bytes()
    of_json = json.loads((copy / "leaf-000000.index.json").read_text())["json_offset"][0]
    for place in (1000, of_json + 3):
        content = bytearray(whole)
        content[place] ^= 1
        tar.write_bytes(content)
        with pytest.raises(ValueError, match="is truncated or altered; encode this split again"):
            LatentReader(copy)[0]


def test_plain_webdataset_reads_them(latents):
    wds = pytest.importorskip("webdataset")
    shards = sorted(str(path) for path in (latents / "train").glob("*.tar"))
    found = {s["__key__"]: s["latents.npy"] for s in wds.WebDataset(shards, shardshuffle=False).decode("l8")}
    for key, sample in samples(latents / "train").items():
        np.testing.assert_array_equal(found[key], sample["latents.npy"])


def test_another_model_is_refused_and_the_same_has_nothing_to_do(
    model_folder, other_model, leaf_shards, latents, tmp_path
):
    before = every_byte(latents)
    run("encode", model_folder, leaf_shards, latents)
    assert "holds latents of another model; name another OUT" in refused("encode", other_model, leaf_shards, latents)
    assert "of another kind" in refused("encode", model_folder, leaf_shards, latents, "--kind", "sample")
    assert every_byte(latents) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("mine")
    assert "exists and holds no latents" in refused("encode", model_folder, leaf_shards, tmp_path / "thesis")


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_too_little_memory_is_told_with_the_option_that_helps(
    command, latents, model_folder, leaf_shards, tmp_path, monkeypatch
):
    def exhausted(*_: object, **__: object) -> torch.Tensor:
        return torch.empty(2**50)

    monkeypatch.setattr(f"msvae.model.autoencoder.AutoencoderKLMultispectralAdapter.{command}", exhausted)
    given = (model_folder, leaf_shards) if command == "encode" else (latents / "model", latents)
    told = refused(command, *given, tmp_path / "out")
    assert "too little memory on cpu for " in told
    assert told.endswith("; give a smaller --batch-size\n")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes_and_another_model_may_not(
    model_folder, other_model, leaf_shards, latents, tmp_path
):
    out, work = tmp_path / "out", tmp_path / ".out.partial" / "data"
    command = [sys.executable, "-m", "msvae", "encode", model_folder, leaf_shards, out, "--batch-size", 8]
    running = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(work.glob("train/*.index.json")):
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    finished = {path: path.stat().st_mtime_ns for path in work.glob("*/*.index.json")}
    assert finished
    assert not out.exists()
    assert "holds unfinished work of other options" in refused("encode", other_model, leaf_shards, out)
    run("encode", model_folder, leaf_shards, out)
    for path, written_ns in finished.items():
        assert (out / path.relative_to(work)).stat().st_mtime_ns == written_ns
    assert every_byte(out) == every_byte(latents)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bands_of_another_model_are_refused(model_folder, tmp_path, leaf_shards):
    config = json.loads((model_folder / "config.json").read_text())
    config["wavelengths_nm"] = [nm + 5 for nm in config["wavelengths_nm"]]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (other / weights).write_bytes((model_folder / weights).read_bytes())
    message = refused("encode", other, leaf_shards, tmp_path / "out")
    assert "holds 5 bands (475, 539, 651, 731, 851 nm)" in message
    assert "expects 5 bands (480, 544, 656, 736, 856 nm)" in message
    assert not (tmp_path / "out").exists()


def test_shards_come_back_as_shards_that_are_sound(latents, leaf_shards, tmp_path):
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


def test_another_model_does_not_decode_shards(latents, other_model, tmp_path):
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


def test_latents_of_a_diffusion_model_are_not_decoded_by_a_model_without_factors(model_folder, tmp_path):
    np.save(tmp_path / "drawn.npy", np.zeros((1, 16, 4, 4), np.float32))
    told = refused("decode", model_folder, tmp_path / "drawn.npy", tmp_path / "out")
    assert "states no factors" in told
    assert "--unscaled" in told
