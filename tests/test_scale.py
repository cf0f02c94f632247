"""Tables of docs/scale.md, and the model of the network behind them on real links."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT


def bench(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "bench" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_script_prints_the_tables_of_the_page():
    document = (ROOT / "docs" / "scale.md").read_text()
    tables = bench("scale.py").strip().split("\n\n")
    assert len(tables) == 5
    for table in tables:
        assert table in document, table


@pytest.mark.slow
def test_a_model_of_two_numbers_predicts_rates_and_sizes_it_was_not_fitted_to(tmp_path: Path):
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces need root and iproute2")
    printed = bench("network.py", "--json", tmp_path / "fit.json")
    rows = json.loads((tmp_path / "fit.json").read_text())["rows"]
    ratios = [row["predicted_by_measured"] for row in rows if row["kind"] == "held out"]
    assert len(ratios) == 6
    assert all(0.8 <= ratio <= 1.2 for ratio in ratios), printed
