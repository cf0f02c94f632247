"""Examples that need no data run as a user runs them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .conftest import ROOT

MASKED_LOSS = ROOT / "examples" / "multispectral" / "test_masked_loss.py"
IGNORED_MASK = f"""
import runpy
from msvae import AutoencoderKLMultispectralAdapter
forward = AutoencoderKLMultispectralAdapter.forward
AutoencoderKLMultispectralAdapter.forward = lambda self, sample, mask=None: forward(self, sample, mask=None)
runpy.run_path({str(MASKED_LOSS)!r}, run_name="__main__")
"""


def run(*arguments: object) -> tuple[int, list[str]]:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture(scope="module")
def masked_loss_lines() -> list[str]:
    code, lines = run(MASKED_LOSS)
    assert code == 0, lines
    return lines


def test_the_script_on_masked_losses_passes_all_of_its_checks(masked_loss_lines):
    *checks, summary = masked_loss_lines
    assert len(checks) == 23 and all(line.startswith("ok     ") for line in checks)
    assert summary == "all checks passed"


@pytest.mark.parametrize(
    "beginning",
    [
        *(f"masked MSE at {wavelength_nm} nm: 0." for wavelength_nm in (475, 539, 731, 851)),
        "spectral angle in radians: 1.",
        "valid_pixels: 501, expected 501",
        "total_pixels: 2048, expected 2048",
        "coverage: 0.24462891, reference 0.24462891",
        "background of noise: MSE 0.",
        "background of NaN: MSE 0.",
        "mask of shape (2, 5, 32, 32): largest difference from (2, 1, 32, 32) is 0.0",
        "mask of shape (2, 32, 32): ValueError: got a mask of shape (2, 32, 32)",
        "coverage without a mask: 1.0, expected 1.0",
        "empty mask: MSE 0.0, spectral angle 0.0, expected 0.0 and 0.0",
        "empty mask: largest gradient 0.0, expected 0.0",
    ],
)
def test_the_script_on_masked_losses_prints_the_numbers_of_each_check(masked_loss_lines, beginning):
    assert any(line.startswith(f"ok     {beginning}") for line in masked_loss_lines), masked_loss_lines


def test_the_script_on_masked_losses_fails_if_the_mask_is_ignored():
    code, lines = run("-c", IGNORED_MASK)
    assert code == 1
    failed = [line for line in lines if line.startswith("FAILED ")]
    assert any(line.startswith("FAILED masked MSE at 475 nm: ") for line in failed)
    assert any(line.startswith("FAILED valid_pixels: 2048, expected 501") for line in failed)
    assert lines[-1] == f"{len(failed)} checks failed"
