"""Every script behind a figure of the docs runs, at its smallest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

SCRIPTS = {
    "beside_step": ["--tiles", "64", "--rounds", "1"],
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
}
"""`network`, `broken_runs`, `seams` and `tilings` want root, minutes, a model or a field; tests and docs run them."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_and_prints_numbers(name):
    script = ROOT / "bench" / f"{name}.py"
    done = subprocess.run([sys.executable, script, *SCRIPTS[name]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\d", done.stdout)
    assert not re.search(r"\bnan\b", done.stdout)


def test_every_script_is_run_or_left_out_for_a_reason():
    scripts = {path.stem for path in Path(ROOT / "bench").glob("*.py")}
    assert scripts == {*SCRIPTS, "network", "broken_runs", "seams", "tilings"}
