"""The package that users install: its version, the files in its wheel, and the workflows that build it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

from .conftest import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_msvae_version_prints_the_version_of_pyproject_without_importing_torch():
    command = [sys.executable, "-X", "importtime", "-m", "msvae", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"msvae {VERSION}\n")
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "msvae.cli" in imported and "torch" not in imported


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel that is built from a copy, so that the repository keeps no build files."""
    copy = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT / "msvae", copy / "msvae", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, "dist"], cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "dist").iterdir()
    assert wheel.name == f"msvae-{VERSION}-py3-none-any.whl"
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_contains_every_file_of_the_package(wheel_files):
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "msvae").rglob("*") if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name}
    assert "msvae/py.typed" in expected
    assert sum(name.endswith(".j2") for name in expected) >= 2
    assert {name for name in wheel_files if name.startswith("msvae/")} == expected


def test_citation_file_changelog_and_launch_files_name_the_version_of_pyproject():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    released = re.findall(r"^## (\d+\.\d+\.\d+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert released[0] == (VERSION, citation["date-released"])
    for path in (*(ROOT / "launch").iterdir(), *(ROOT / "docs").glob("*.md")):
        tags = re.findall(r"msvae:(\d+\.\d+\.\d+)", path.read_text())
        assert set(tags) <= {VERSION}, path


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_use_the_commands_and_files_of_the_repository(path):
    (job,) = yaml.safe_load(path.read_text())["jobs"].values()
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    named = re.findall(r"\b(?:launch/\w+\.sh|constraints\.txt)", commands)
    assert named and all((ROOT / name).is_file() for name in named)
