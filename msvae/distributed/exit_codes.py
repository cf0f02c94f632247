"""What a collective that fails says: another rank is gone, or stands still."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch.distributed as dist

EXIT_CODE = 69
"""Of a rank that merely lost others: run the same command again (EX_UNAVAILABLE of sysexits.h)."""
PACKAGE = Path(__file__).parents[1]
FROM_GLOO = re.compile(r"gloo/[\w/]+\.cc:\d+\]\s*")
TIMED_OUT = re.compile(r"time(d )?out(?!.*refused)", re.IGNORECASE)


def lost_ranks_message(error: BaseException) -> str | None:
    """One line for a rank that merely waited for others; None when the error is this rank's own."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not FROM_GLOO.search(text):
        return None
    reason = FROM_GLOO.split(text.splitlines()[0])[-1].rstrip(". ")
    where = _innermost_of_ours(error)
    if TIMED_OUT.search(text):
        return (
            f"the other ranks did not come to {where} within train.timeout_s ({reason}); stacks/ of the run folder "
            "says where each rank stood that was still running. Run the same command again to go on"
        )
    return f"lost the other ranks in {where} ({reason}); the rank that failed first says why"


def _innermost_of_ours(error: BaseException) -> str:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if PACKAGE in Path(frame.f_code.co_filename).parents]
    # what a collective is for is known to its caller
    named = [frame for frame in ours if not frame.f_code.co_filename.endswith("collectives.py")] or ours
    return named[-1].f_code.co_qualname if named else "a collective"
