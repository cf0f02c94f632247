"""Where every thread of a rank stands, written to the run folder when the rank has stood still for too long."""

from __future__ import annotations

import faulthandler
from pathlib import Path

SHARE_OF_TIMEOUT = 0.8
"""Before the collectives give up, and the process ends."""


class Watchdog:
    """Writes `stacks/rank-00000.txt` unless it is fed in time. It needs no lock of Python's to do so."""

    def __init__(self, out: Path, rank: int, timeout_s: float) -> None:
        self._path, self._after_s = out / "stacks" / f"rank-{rank:05d}.txt", timeout_s * SHARE_OF_TIMEOUT
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # a run that was started again keeps what was written before
        self._file = self._path.open("a")

    def feed(self) -> None:
        """Begin to count anew."""
        faulthandler.dump_traceback_later(self._after_s, file=self._file)

    def close(self) -> None:
        """Stop counting. Leaves no file behind when nothing was written."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()
