"""The commands of docs/using.md and the example run as written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image

from ..conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]


def test_every_command_of_using_md_runs(model_folder, leaf_images, leaf_shards, rice, tmp_path, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "runs" / "leaves" / "best")
    shutil.copytree(leaf_images, tmp_path / "leaves")
    shutil.copytree(leaf_shards, tmp_path / "shards" / "leaves")
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "field").symlink_to(rice)
    page = (ROOT / "docs" / "using.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = "set -e\n" + "\n".join(blocks).replace("--steps 200", "--steps 3")
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["moments"].shape == (32, 4, 4)
    for name in (
        "leaf_000-recon.tif",
        "recon/leaf_000.tif",
        "field-recon.tif",
        "latents/model/config.json",
        "tiles/train/manifest.json",
    ):
        assert (tmp_path / name).is_file(), name


def test_the_example_trains_on_latents_and_writes_images_of_all_bands(model_folder, leaf_shards, tmp_path):
    msvae = [sys.executable, "-m", "msvae"]
    subprocess.run([*msvae, "encode", model_folder, leaf_shards, tmp_path / "latents"], check=True, cwd=ROOT)
    command = [sys.executable, ROOT / "examples" / "latent_diffusion.py", tmp_path / "latents", tmp_path / "drawn"]
    done = subprocess.run([*map(str, command), "--steps", "60"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < 0.9 * losses[0]
    with rasterio.open(tmp_path / "drawn" / "drawn-000.tif") as raster:
        assert raster.shape == (32, 32)
        assert [raster.tags(band)["wavelength"] for band in (1, 5)] == ["474.73", "850.59"]
        assert np.isfinite(raster.read()).all()
    assert Image.open(tmp_path / "drawn" / "drawn-000.png").size == (32, 32)
