"""`msvae encode`: shards of latents, and the factors for a diffusion model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

from msvae import AutoencoderKLMultispectralAdapter
from msvae.shards.latents import LatentReader

from ..conftest import ROOT
from .conftest import every_byte, refused, run, samples


def test_latents_are_the_posterior_of_each_tile_with_its_mask_and_json(model, leaf_shards, latents):
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
    """The variance of posterior samples is the variance of the means plus the posterior variance."""
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


def test_the_model_next_to_the_latents_is_complete(latents, model, leaf_shards):
    again = AutoencoderKLMultispectralAdapter.from_pretrained(latents / "model")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("inside", "given", "becomes"),
    [("train/notes", "..", "train"), ("val", ".", "val"), ("", "val", "val"), ("", "model", "train")],
)
def test_a_split_of_any_name_is_encoded_and_kept_apart_from_the_model(
    model_folder, leaf_shards, latents, tmp_path, monkeypatch, inside, given, becomes
):
    shards = tmp_path / "shards"
    shutil.copytree(leaf_shards, shards)
    shutil.copytree(leaf_shards / "train", shards / "model")
    (shards / "train" / "notes").mkdir()
    monkeypatch.chdir(shards / inside)
    run("encode", model_folder, given, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(["model", becomes])
    assert samples(tmp_path / "out" / becomes).keys() == samples(latents / becomes).keys()
    assert not list((tmp_path / "out" / "model").glob("*.tar"))


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


def test_the_torch_dataset_returns_every_sample_and_detects_damage(latents, tmp_path):
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


def test_plain_webdataset_reads_shards_of_latents(latents):
    wds = pytest.importorskip("webdataset")
    shards = sorted(str(path) for path in (latents / "train").glob("*.tar"))
    found = {s["__key__"]: s["latents.npy"] for s in wds.WebDataset(shards, shardshuffle=False).decode("l8")}
    for key, sample in samples(latents / "train").items():
        np.testing.assert_array_equal(found[key], sample["latents.npy"])


def test_keys_of_any_length_and_alphabet_are_kept(model_folder, leaf_shards, latents, tmp_path):
    wds = pytest.importorskip("webdataset")
    keys = {"leaf" * 40: 0, "field/" * 20 + "leaf": 1, "Blätter_ü": 2}
    encoded = samples(latents / "train")
    packed = list(encoded)[: len(keys)]
    (tmp_path / "others").mkdir()
    with (
        tarfile.open(leaf_shards / "train" / "leaf-000000.tar") as tiles,
        tarfile.open(tmp_path / "others" / "a.tar", "w") as others,
    ):
        for key, number in keys.items():
            for ending in ("bands.npy", "mask.png"):
                member = tiles.getmember(f"{packed[number]}.{ending}")
                content = tiles.extractfile(member)
                member.name = f"{key}.{ending}"
                others.addfile(member, content)
    manifest = json.loads((leaf_shards / "train" / "manifest.json").read_text())
    wavelengths = ",".join(map(str, manifest["wavelengths_nm"]))
    run("index", tmp_path / "others", "--wavelengths", wavelengths, "--scale", manifest["scale"][0])
    run("encode", model_folder, tmp_path / "others", tmp_path / "out")
    run("decode", tmp_path / "out" / "model", tmp_path / "out", tmp_path / "tiles")
    assert "train: sound" in run("verify", tmp_path / "tiles")
    found = {sample.key: sample.latents for sample in LatentReader(tmp_path / "out" / "train")}
    (tar,) = (tmp_path / "out" / "train").glob("*.tar")
    plain = {s["__key__"]: s["latents.npy"] for s in wds.WebDataset(str(tar), shardshuffle=False).decode("l8")}
    assert list(found) == list(plain) == list(keys)
    for key, number in keys.items():
        np.testing.assert_allclose(found[key], encoded[packed[number]]["latents.npy"], atol=1e-4)
        np.testing.assert_array_equal(plain[key], found[key])


def test_another_model_is_refused_and_the_same_model_changes_nothing(
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
def test_an_out_of_memory_error_names_the_option_to_reduce(
    command, latents, model_folder, leaf_shards, tmp_path, monkeypatch
):
    def exhausted(*_: object, **__: object) -> torch.Tensor:
        return torch.empty(2**50)

    monkeypatch.setattr(f"msvae.model.autoencoder.AutoencoderKLMultispectralAdapter.{command}", exhausted)
    given = (model_folder, leaf_shards) if command == "encode" else (latents / "model", latents)
    message = refused(command, *given, tmp_path / "out")
    assert "too little memory on cpu for " in message
    assert message.endswith("; give a smaller --batch-size\n")


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes_and_refuses_another_model(
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
