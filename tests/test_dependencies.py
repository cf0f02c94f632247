"""A plain installation holds every package that msvae imports when it runs."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from .conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"obstore": "cloud"}
"""Imports that need an extra, which an error message names."""
INDIRECT = {
    "tensorboard": "torch.utils.tensorboard imports it",
    "transformers": "accelerate imports it to read its version when a DeepSpeed plugin is made",
    "webdataset": "users stream msvae's shards through its pipelines, as docs/streaming.md shows",
}
"""Dependencies that msvae does not import itself."""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[; <>=]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def imported(folder: str) -> Iterator[tuple[str, Path]]:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                yield node.module.split(".")[0], path


def distributions() -> dict[str, Path]:
    """Every distribution that the package and its entry points import, and one file that does."""
    found, packages = {}, packages_distributions()
    for folder in ("msvae", "train", "launch"):
        for module, path in imported(folder):
            if module not in sys.stdlib_module_names and module != "msvae":
                for distribution in packages.get(module, [module]):
                    found[distribution.lower().replace("_", "-")] = path
    return found


def test_every_import_at_run_time_is_a_declared_dependency():
    declared = names(PROJECT["dependencies"])
    for distribution, path in distributions().items():
        if distribution in OPTIONAL:
            assert distribution in names(PROJECT["optional-dependencies"][OPTIONAL[distribution]])
        else:
            assert distribution in declared, f"{path} imports {distribution}, which pyproject.toml does not declare"


def test_every_declared_dependency_is_used():
    assert names(PROJECT["dependencies"]) - distributions().keys() == INDIRECT.keys()
