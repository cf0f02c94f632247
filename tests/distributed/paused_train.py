"""Launched by tests: trains as train.py does, but pauses once at a chosen moment.

`PAUSE` is "evaluation RANK STEP" or "checkpoint RANK STEP". The file `PAUSED` is created when the pause starts. The
pause ends when the file `GO` exists.
"""

from __future__ import annotations

import os
import runpy
import time
from pathlib import Path
from typing import Any

from msvae.training import checkpoints
from msvae.training.validation import Validation
from tests.conftest import ROOT
from tests.distributed.interrupted_runs import PATIENCE_S

where, rank, step = os.environ.get("PAUSE", "nowhere 0 0").split()
save_file, evaluate = checkpoints.save_file, Validation._evaluate


def pause() -> None:
    paused, go = Path(os.environ["PAUSED"]), Path(os.environ["GO"])
    if os.environ["RANK"] == rank and not paused.exists():
        paused.touch()
        deadline = time.monotonic() + PATIENCE_S
        while not go.exists():
            assert time.monotonic() < deadline, "the test did not end the pause"
            time.sleep(0.02)


def save_half(tensors: Any, path: Path) -> None:
    save_file(tensors, path)
    if where == "checkpoint" and path.parent.name == f".step-{int(step):08d}.partial":
        os.truncate(path, path.stat().st_size // 2)
        pause()


def evaluate_late(self: Validation, evaluator: Any, now: int) -> Any:
    if where == "evaluation" and now == int(step):
        pause()
    return evaluate(self, evaluator, now)


checkpoints.save_file, Validation._evaluate = save_half, evaluate_late
runpy.run_path(str(ROOT / "train" / "train.py"), run_name="__main__")
