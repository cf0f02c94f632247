"""Fixtures for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import ROOT

TRAIN = ROOT / "train" / "train.py"


@pytest.fixture
def impatient(tmp_path) -> Path:
    """Return a train.py that waits seconds, not minutes, to see whether another run is still running."""
    script = tmp_path / "impatient.py"
    script.write_text(
        "from msvae.training import lock, run_storage\n"
        "lock.RENEW_S, lock.POLL_S = 1.0, 0.2\n"
        "lock.ABANDONED_S = run_storage.ABANDONED_S = 6.0\n"
        f"exec(open({str(TRAIN)!r}).read())\n"
    )
    return script
