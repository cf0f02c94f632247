"""The package that users install: its version, and the files in its wheel."""

from __future__ import annotations

import subprocess
import sys
import tomllib

from .conftest import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_msvae_version_prints_the_version_of_pyproject_without_importing_torch():
    command = [sys.executable, "-X", "importtime", "-m", "msvae", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"msvae {VERSION}\n")
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "msvae.cli" in imported and "torch" not in imported
