"""Commands on a dataset at a URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from msvae.cli import app
from msvae.evaluation.baselines import find_training_split
from msvae.shards.manifest import Manifest
from msvae.shards.reader import ShardReader
from msvae.shards.splits import tile_origins

from ..servers import BUCKET, set_credentials


@pytest.fixture
def place(moto, monkeypatch) -> str:
    set_credentials(monkeypatch, f"http://{moto[0]}:{moto[1]}")
    return f"s3://{BUCKET}/field/shards"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_dataset_on_s3_is_verified_inspected_and_simulated(place, leaf_shards, tmp_path):
    near, far = (run("verify", where).splitlines() for where in (leaf_shards, place))
    assert [line.replace(place, str(leaf_shards)) for line in far] == near
    near, far = (run("inspect", where) for where in (leaf_shards, place))
    assert far == near
    run("inspect", place, "--png", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert "tiles in" in run("simulate", f"{place}/train", "--nodes", 2, "--gpus", 1, "--global-batch", 8)


def test_tars_on_s3_are_indexed_into_a_local_folder(place, leaf_shards, tmp_path):
    wavelengths = ",".join(map(str, Manifest.load(leaf_shards / "train").wavelengths_nm))
    options = ("--wavelengths", wavelengths, "--scale", "0.0001", "--out", tmp_path / "out", "--overwrite")
    run("index", place, *options)
    for split in ("train", "val", "test"):
        made, packed = Manifest.load(tmp_path / "out" / split), Manifest.load(Path(leaf_shards) / split)
        assert made.shards == packed.shards
        assert made.statistics.num_pixels == packed.statistics.num_pixels


def test_the_images_of_tiles_on_s3_equal_those_of_the_folder(place, leaf_shards):
    near, far = (tile_origins(ShardReader(f"{where}/val")) for where in (leaf_shards, place))
    assert far == near
    assert find_training_split(f"{place}/val") == f"{place}/train"
    assert find_training_split(f"{place}/val/") == f"{place}/train"
    assert find_training_split(f"{place}") is None
