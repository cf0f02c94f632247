"""Real launches of `msvae encode` on one process and on two write the same bytes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from msvae import AutoencoderKLMultispectralAdapter
from msvae.model.build import TINY_BACKBONE
from msvae.shards.manifest import Manifest

from ..conftest import ROOT, launch_command


def encode(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = launch_command("msvae", "encode", *arguments, processes=processes)
    command.insert(command.index("msvae"), "--module")
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def model_folder(leaf_shards, tmp_path_factory) -> Path:
    statistics = Manifest.load(leaf_shards / "train").statistics
    folder = tmp_path_factory.mktemp("model") / "best"
    model = AutoencoderKLMultispectralAdapter(**TINY_BACKBONE, band_mean=statistics.mean, band_std=statistics.std)
    model.save_pretrained(folder)
    return folder


def test_one_process_and_two_write_the_same_bytes(model_folder, leaf_shards, tmp_path):
    for processes in (1, 2):
        done = encode(processes, model_folder, leaf_shards, tmp_path / str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("in its config.json") == 1
    one, two = (
        {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
        for out in (tmp_path / "1", tmp_path / "2")
    )
    assert one == two
    assert len([name for name in one if name.endswith(".tar")]) > 3


def test_an_error_on_two_ranks_is_one_line(model_folder, leaf_shards, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    done = encode(2, model_folder, leaf_shards, tmp_path / "out")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "exists and holds no latents" in errors[0]
