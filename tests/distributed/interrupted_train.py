"""Launched by a test: trains as train.py does. `stop STEP` asks it to stop at a step, `kill STEP` kills it there.

The log is flushed before, as the writer of TensorBoard does by itself every two minutes.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from msvae.training.trainer import Trainer

kind, step = sys.argv[1:3]
del sys.argv[1:3]
check_and_log = Trainer._check_and_log


def interrupt(self: Trainer, *arguments: Any) -> None:
    check_and_log(self, *arguments)
    if self.step == int(step) and self.log is not None:
        self.log.flush()
        os.kill(os.getpid(), signal.SIGTERM if kind == "stop" else signal.SIGKILL)


Trainer._check_and_log = interrupt
runpy.run_path(str(Path(__file__).parents[2] / "train" / "train.py"), run_name="__main__")
