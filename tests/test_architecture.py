"""docs/architecture.md names files, functions and imports that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .conftest import ROOT

PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text()
REFERENCES = re.findall(r"\[`([\w.]+)`\]\(\.\./((?:msvae|train|tests)/[\w/]+\.py)\)", TEXT)
PACKAGES = {path.parent.name for path in (ROOT / "msvae").glob("*/__init__.py")}


def defined(path: Path) -> set[str]:
    """Names of a module: functions, classes, constants, and members of classes as `Class.member`."""
    found = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)

    visit(ast.parse(path.read_text()).body, "")
    return found


def imports() -> dict[str, set[str]]:
    """The packages of msvae that each package imports."""
    found: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for package in PACKAGES:
        for path in (ROOT / "msvae" / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                parts = [module.split(".") for module in modules if module.startswith("msvae.")]
                found[package] |= {part[1] for part in parts if part[1] in PACKAGES - {package}}
    return found


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = list(graph[start])
    while todo:
        package = todo.pop()
        if package not in found:
            found.add(package)
            todo += graph[package]
    return found


@pytest.mark.parametrize(("name", "file"), REFERENCES)
def test_every_name_in_the_page_is_defined_in_the_file_that_it_links_to(name, file):
    assert (ROOT / file).is_file(), f"docs/architecture.md links to {file}"
    assert name in defined(ROOT / file), f"docs/architecture.md names {name}, which {file} does not define"


def test_the_page_has_enough_references_to_be_checked():
    assert len(REFERENCES) > 30


def test_the_drawing_shows_the_imports_between_packages():
    """Arrows that follow from others are left out."""
    (drawing,) = re.findall(r"```mermaid\n(.*?)```", TEXT, flags=re.DOTALL)
    drawn = set(re.findall(r"^ +(\w+) --> (\w+)$", drawing, flags=re.MULTILINE))
    graph = imports()
    needed = {
        (package, used)
        for package, direct in graph.items()
        for used in direct
        if not any(used in reached(graph, other) for other in direct - {used})
    }
    assert drawn == needed
