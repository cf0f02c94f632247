"""Every script behind a figure in docs/ runs in its smallest configuration."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

SCRIPTS = {
    "checkpoints": ["--steps", "4", "--rounds", "1"],
    "checksum": ["--tiles", "20"],
    "frozen_encoder": [],
    "index": ["--tiles", "60"],
    "loader": ["--tiles", "128", "--rounds", "1", "--readers", "1", "--compressed"],
    "log": ["--px", "64", "--batch", "1", "--steps", "1"],
    "losses": [],
    "pack": ["--images", "2", "--side", "512"],
    "scale": [],
    "scaling": ["--steps", "4", "--rounds", "1"],
    "step": ["--px", "64", "--batch", "1", "--rounds", "1", "--steps", "1"],
    "step_with_loader": ["--tiles", "64", "--rounds", "1"],
}
"""Name and arguments of each script."""
NOT_RUN = {"network", "broken_runs", "seams", "tilings"}
"""These need root, minutes, a model and a field of images."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_and_prints_numbers(name):
    script = ROOT / "bench" / f"{name}.py"
    done = subprocess.run([sys.executable, script, *SCRIPTS[name]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\d", done.stdout)
    assert not re.search(r"\bnan\b", done.stdout)


def test_every_script_is_listed():
    scripts = {path.stem for path in Path(ROOT / "bench").glob("*.py")}
    assert scripts == {*SCRIPTS, *NOT_RUN}
