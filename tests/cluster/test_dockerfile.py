"""launch/Dockerfile, as far as it can be tested without building it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import ROOT

DOCKERFILE = ROOT / "launch" / "Dockerfile"
STAGES = DOCKERFILE.read_text().split("\nFROM ")[1:]


def test_hadolint_reports_nothing():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_bases_and_packages_are_pinned_and_the_last_stage_neither_builds_nor_is_root():
    first, last = STAGES
    for stage in STAGES:
        assert re.match(r"python:3\.11\.\d+-slim-bookworm\b", stage)
    assert "--constraint constraints.txt" in first
    assert "pip" not in last
    assert "gcc" not in last
    assert re.search(r"^USER 1000$", last, re.MULTILINE)


def test_all_copied_files_exist_and_all_needed_files_are_copied():
    copied = [word for line in STAGES[0].splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"msvae", "train", "configs", "launch", "pyproject.toml", "constraints.txt"} <= set(copied)
