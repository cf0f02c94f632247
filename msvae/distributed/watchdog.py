"""A watchdog: it writes the stack of every thread of a rank to the run folder if the rank makes no progress."""

from __future__ import annotations

import faulthandler
from pathlib import Path

SHARE_OF_TIMEOUT = 0.8
"""Share of `train.timeout_s` after which stacks are written: before the collectives time out and the process ends."""


class Watchdog:
    """Writes `stacks/rank-00000.txt` unless `feed` is called in time. It does not need Python's interpreter lock."""

    def __init__(self, out: Path, rank: int, timeout_s: float) -> None:
        self._path, self._after_s = out / "stacks" / f"rank-{rank:05d}.txt", timeout_s * SHARE_OF_TIMEOUT
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # appending keeps the stacks of earlier starts of the run
        self._file = self._path.open("a")

    def feed(self) -> None:
        """Restart the countdown."""
        faulthandler.dump_traceback_later(self._after_s, file=self._file)

    def close(self) -> None:
        """Stop the countdown, and remove the file if nothing was written."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()
