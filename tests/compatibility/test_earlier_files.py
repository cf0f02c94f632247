"""Files made by earlier code still load, with the same values. `make_files.py` describes how `files/` was made."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from msvae import AutoencoderKLMultispectralAdapter
from msvae.config import load_config
from msvae.shards.reader import ShardReader

from ..conftest import ROOT, launch_command

FILES = Path(__file__).parent / "files"
SHARDS = sorted(path.parent.relative_to(FILES / "shards") for path in FILES.glob("shards/*/*/manifest.json"))
CONFIGURATIONS = [*sorted(FILES.glob("configs/*.yaml")), FILES / "run" / "config.yaml"]
EVERY_KEY = FILES / "configs" / "every-key.yaml"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a copy of the files that a test may change."""
    return shutil.copytree(FILES, tmp_path / "files")


@pytest.mark.parametrize("split", SHARDS, ids=str)
def test_the_shard_reader_returns_the_pixels_masks_and_json_of_earlier_shards(split):
    reader = ShardReader(FILES / "shards" / split)
    expected = samples(FILES / "shards" / split)
    tile, leaf_mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], bool)
    places = [(shard, row) for shard, count in enumerate(reader.samples_per_shard) for row in range(count)]
    assert [reader.key(*place) for place in places] == list(expected)
    for place in places:
        sample = expected[reader.read_into(*place, tile, leaf_mask)]
        np.testing.assert_array_equal(tile, sample["tile"])
        np.testing.assert_array_equal(leaf_mask, sample["mask"])
        assert json.loads(reader.json_member(*place)) == sample["json"]


@pytest.mark.parametrize("folder", ["run/best", "latents/model"])
def test_an_earlier_model_reconstructs_the_same_reflectance(folder):
    model = AutoencoderKLMultispectralAdapter.from_pretrained(FILES / folder)
    (sample,) = samples(FILES / "shards" / "none" / "val").values()
    scale = np.array(manifest(FILES / "shards" / "none" / "val")["scale"], np.float32)[:, None, None]
    reflectance, leaf_mask = torch.from_numpy(sample["tile"] * scale), torch.from_numpy(sample["mask"])
    with torch.no_grad():
        reconstruction, _ = model(sample=reflectance[None], mask=leaf_mask[None, None])
    np.testing.assert_allclose(reconstruction, expected_reconstruction(), rtol=0, atol=1e-5)


def test_training_resumes_an_earlier_checkpoint_with_the_losses_of_an_uninterrupted_run(files):
    command = launch_command(
        ROOT / "train" / "train.py", "--config", "run/config.yaml", "--train.max_steps", 4, processes=1
    )
    run_in(files, command)
    before, after = ((folder / "run" / "metrics.jsonl").read_text() for folder in (FILES, files))
    assert after.startswith(before), "training did not resume, it started from step 0"
    assert (files / "run" / "checkpoints" / "step-00000004").is_dir()
    expected = json.loads((FILES / "expected" / "losses.json").read_text())
    metrics, validation = (losses(files / "run" / name) for name in ("metrics.jsonl", "validation.jsonl"))
    assert metrics == pytest.approx(expected["metrics.jsonl"], rel=1e-4)
    assert list(validation) == ["0", "2", "4"]
    assert validation["4"] == pytest.approx(expected["validation.jsonl"]["4"], rel=1e-4)


def test_earlier_latents_decode_to_the_same_reflectance_with_the_model_in_their_folder(files):
    run_in(files, [sys.executable, "-m", "msvae", "decode", "latents/model", "latents", "decoded"])
    for split in ("train", "val"):
        tiles, decoded = samples(FILES / "shards" / "none" / split), samples(files / "decoded" / split)
        assert list(decoded) == list(tiles)
        for key, sample in tiles.items():
            np.testing.assert_array_equal(decoded[key]["mask"], sample["mask"])
            assert decoded[key]["json"] == sample["json"]
    (sample,) = samples(files / "decoded" / "val").values()
    np.testing.assert_allclose(sample["tile"], expected_reconstruction()[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_an_earlier_configuration_loads_with_every_value_that_it_sets(path):
    loaded, expected = flat(load_config(path).model_dump(mode="json")), flat(yaml.safe_load(path.read_text()))
    assert {key: loaded.get(key) for key in expected} == expected


def test_every_earlier_configuration_key_is_still_a_command_line_option():
    expected = flat(yaml.safe_load(EVERY_KEY.read_text()))
    options = [f"--{key}={json.dumps(value).strip(chr(34))}" for key, value in expected.items()]
    loaded = flat(load_config(None, options).model_dump(mode="json"))
    assert {key: loaded.get(key) for key in expected} == expected


def samples(split: Path) -> dict[str, dict[str, Any]]:
    """Return all samples in stored order, read without msvae.

    A sample has `tile` (a tile or latents), `mask` (H, W) bool, and `json`.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(split.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, ending = member.name.split(".", 1)
                content = tar.extractfile(member).read()
                name, value = decoded_member(ending, content, manifest(split))
                found.setdefault(key, {})[name] = value
    return found


def decoded_member(ending: str, content: bytes, about_split: Mapping[str, Any]) -> tuple[str, Any]:
    if ending == "json":
        return "json", json.loads(content)
    if ending == "mask.png":
        return "mask", np.array(Image.open(io.BytesIO(content))) > 0
    if ending == "bands.blosc2":
        # shards/README.md: 128 plus each value minus the one to its left, modulo 2^16
        dtype, side = np.dtype(about_split["dtype"]), about_split["tile_px"]
        assert dtype == np.uint16
        stored = np.frombuffer(imagecodecs.blosc2_decode(content), "<u2").reshape(-1, side, side)
        return "tile", ((stored.astype(np.int64) - 128).cumsum(axis=2) % 2**16).astype(dtype)
    assert ending in ("bands.npy", "latents.npy")
    return "tile", np.load(io.BytesIO(content))


def manifest(split: Path) -> dict[str, Any]:
    return json.loads((split / "manifest.json").read_text())


def expected_reconstruction() -> np.ndarray:
    return np.load(FILES / "expected" / "reconstruction.npy")


def run_in(folder: Path, command: list[str]) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(path: Path) -> dict[str, float]:
    return {str(row["step"]): row["loss"] for row in map(json.loads, path.read_text().splitlines())}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted key."""
    values: dict[str, Any] = {}
    for name, section in config.items():
        if isinstance(section, Mapping):
            values |= {f"{name}.{key}": value for key, value in section.items()}
        else:
            values[name] = section
    return values
