"""Memory that runs out is told in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import numpy, torch
from msvae.engine.setup import run_script
run_script(lambda: {0}, "stopped", "take less")
"""


@pytest.mark.parametrize("allocation", ["torch.empty(2**50)", "numpy.empty(2**50)"])
def test_a_script_that_gets_no_memory_ends_with_2_and_says_how_to_take_less(allocation):
    command = [sys.executable, "-c", SCRIPT.format(allocation)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: too little memory (")
    assert done.stderr.endswith("; take less\n")
    assert done.stderr.count("\n") == 1
