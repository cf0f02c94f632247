"""Files of a report are replaced together, and a failure leaves the earlier files unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msvae.files import partial_path, remove_abandoned, replace_files


def write(out: Path, text: str, fail: bool = False) -> None:
    with replace_files(out, last="numbers.json") as new:
        (new / "numbers.json").write_text(text)
        (new / "pictures").mkdir()
        (new / "pictures" / "a.png").write_text(text)
        if fail:
            raise ValueError("disk")


def content(out: Path) -> dict[str, str]:
    return {str(file.relative_to(out)): file.read_text() for file in out.rglob("*") if file.is_file()}


def test_files_of_a_report_appear_together_or_not_at_all_and_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for text in ("first", "second"):
        write(tmp_path, text)
    with pytest.raises(ValueError, match="disk"):
        write(tmp_path, "third", fail=True)
    expected = {"notes.txt": "mine", "numbers.json": "second", str(Path("pictures/a.png")): "second"}
    assert content(tmp_path) == expected
    assert not list(tmp_path.glob(".*"))


def test_the_file_with_the_numbers_appears_after_all_others(tmp_path, monkeypatch):
    """Readers look for this file."""
    order = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append(target.name), replace(self, target))[1])
    write(tmp_path, "text")
    assert order == ["a.png", "numbers.json"]


@pytest.mark.parametrize("name", ["leaf.tif", "leaf[1].tif", "leaf *?.tif"])
def test_partial_files_of_processes_that_have_ended_are_removed(tmp_path, name):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    own = partial_path(tmp_path / name)
    abandoned = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{process.pid}-"))
    of_another = partial_path(tmp_path / f"x{name}")
    for file in (own, abandoned, of_another):
        file.touch()
    remove_abandoned(tmp_path / name)
    assert set(tmp_path.iterdir()) == {own, of_another}
