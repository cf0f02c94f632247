"""A look at something that may never answer, such as a disk of a server that is gone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

Found = dict[str, Any]
LEAST_S = 0.5


class Deadline:
    """Shared by all looks of a rank, so that it comes to the next collective in time."""

    def __init__(self, timeout_s: float) -> None:
        self._ends_at_s = time.monotonic() + timeout_s

    def look(self, find: Callable[[], Found]) -> Found:
        """What `find` finds; `{"fault": TEXT}` when it fails in any way or gives no answer in time."""
        answer: queue.SimpleQueue[Found] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put(find())
            except Exception as error:  # a rank that fails here must still come to the collectives of the others
                answer.put({"fault": _one_line(error)})

        left_s = max(LEAST_S, self._ends_at_s - time.monotonic())
        # one that is stuck in the kernel cannot be ended, and must not keep the process
        threading.Thread(target=run, daemon=True).start()
        try:
            return answer.get(timeout=left_s)
        except queue.Empty:
            return {"fault": f"no answer within {left_s:.0f} s"}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
