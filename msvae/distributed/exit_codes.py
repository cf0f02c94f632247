"""All exit codes of training and evaluation, and one-line messages for the errors that cause them.

| code | meaning |
|---|---|
| 0 | The run finished. |
| 1 | An unexpected error, with a traceback. `msvae doctor`: at least one check found a fault. |
| 2 | `USER_ERROR`: an error that one line explains, such as a wrong option or a full disk. |
| 69 | `LOST_RANKS`: this rank is healthy, but other ranks ended or did not answer in time. |
| 75 | `STOPPED`: the run was asked to stop and saved a checkpoint. |
| 128 + n | A second signal n ended the process immediately (`msvae/training/stop.py`). |
| 130 | `INTERRUPTED`: Ctrl-C. |

After 69 and 75 the same command continues the run. `docs/faults.md` says for each code whether to start again.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from msvae.credentials import hide_credentials

USER_ERROR = 2
LOST_RANKS = 69
"""EX_UNAVAILABLE of sysexits.h."""
STOPPED = 75
"""EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130

FOLDER_VARIABLE = "MSVAE_EXIT_CODES"
"""Environment variable that names a folder. Each local rank writes its exit code to a file there, because launchers
hide the exit codes of ranks. `launch/node.sh` sets the variable and reads the files."""
MAIN_RANK_FIRST_S = 5.0
"""Time that other ranks wait, so that rank 0 is the one that reports an error of all ranks."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)

PACKAGE = Path(__file__).parents[1]
GLOO_PREFIX = re.compile(r"gloo/[\w/]+\.cc:\d+\]\s*")
"""Source position at the beginning of an error message of gloo."""
TIMED_OUT = re.compile(r"time(d )?out(?!.*refused)", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: [^.]*|CUDA error: out of memory|\w+_STATUS_ALLOC_FAILED|std::bad_alloc"
)
"""Messages of RuntimeErrors by which torch reports that memory ran out."""


def run_script(
    main: Callable[[], int | None],
    when_interrupted: str = "stopped",
    when_out_of_memory: str = "free memory, or use a machine or GPU with more",
) -> NoReturn:
    """Run an entry point, and end the process with the exit code that it returns, 0 if it returns None.

    A ValueError, a failing or full disk and a lack of memory become one line on stderr, `USER_ERROR`, and the message
    in torchrun's summary. If other ranks are lost, one line on stderr says so, and the exit code is `LOST_RANKS`; the
    summary is left to the rank that failed first.

    Args: line to print after Ctrl-C; advice to print if memory runs out.
    """
    rank = int(os.environ.get("RANK", 0))
    # a code that was written before a restart is not the code of this process
    _write_exit_code("")
    try:
        _exit(main() or 0)
    except ValueError as error:
        if rank:
            # most errors occur on all ranks: rank 0 reports them, and the launcher then ends the other ranks
            time.sleep(MAIN_RANK_FIRST_S)
        _exit_with_summary(_print_error(rank, str(error)), USER_ERROR)
    except (OSError, RuntimeError, MemoryError) as error:
        if (memory := out_of_memory_message(error)) is not None:
            line = _print_error(rank, f"too little memory ({memory}); {when_out_of_memory}")
            _exit_with_summary(line, USER_ERROR)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            line = _print_error(
                rank, f"{error}: the disk is full or fails; free space or repair it, then run the same command again"
            )
            _exit_with_summary(line, USER_ERROR)
        if (lost := lost_ranks_message(error)) is None:
            raise
        line = _print_error(rank, lost)
        # the launcher sends SIGTERM to this rank as soon as it notices the rank that failed first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(MAIN_RANK_FIRST_S)
        _exit_with_summary(line, LOST_RANKS)
    except KeyboardInterrupt:
        if rank == 0:
            print(when_interrupted, file=sys.stderr, flush=True)
        _exit(INTERRUPTED)


def out_of_memory_message(error: BaseException) -> str | None:
    """Return one line that says which allocation failed, or None if the error is not a lack of memory.

    The memory may be that of a GPU or of the machine.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return text.splitlines()[0].rstrip(". ") if text else "MemoryError"
    if isinstance(error, OSError):
        return text if error.errno == errno.ENOMEM else None
    found = OUT_OF_MEMORY.search(text) if isinstance(error, RuntimeError) else None
    return found[0] if found else None


def lost_ranks_message(error: BaseException) -> str | None:
    """Return one line for a collective that failed because of another rank, or None if this rank caused the error."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not GLOO_PREFIX.search(text):
        return None
    reason = GLOO_PREFIX.split(text.splitlines()[0])[-1].rstrip(". ")
    where = _innermost_function(error)
    if TIMED_OUT.search(text):
        return (
            f"the other ranks did not reach {where} within train.timeout_s ({reason}); the files in stacks/ of the "
            "run folder show where each running rank was waiting. Run the same command again to continue"
        )
    return f"lost the other ranks in {where} ({reason}); the rank that failed first reports the cause"


def _innermost_function(error: BaseException) -> str:
    """Return the name of the innermost function of msvae in the traceback that called a collective."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if PACKAGE in Path(frame.f_code.co_filename).parents]
    # the name of the caller is more informative than the name of the collective
    callers = [frame for frame in ours if not frame.f_code.co_filename.endswith("collectives.py")] or ours
    return callers[-1].f_code.co_qualname if callers else "a collective"


def _print_error(rank: int, message: str) -> str:
    line = hide_credentials(f"error on rank {rank}: {message}" if rank else f"error: {message}")
    print(line, file=sys.stderr, flush=True)
    return line


def _exit_with_summary(line: str, exit_code: int) -> NoReturn:
    """End the process, and write the line to torchrun's summary of failures."""
    if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(summary).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    _exit(exit_code)


def _exit(exit_code: int) -> NoReturn:
    """End the process without a shutdown of the interpreter.

    A thread of gloo that frees its last tensor during the shutdown would abort the process.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    _write_exit_code(str(exit_code))
    os._exit(exit_code)


def _write_exit_code(text: str) -> None:
    if folder := os.environ.get(FOLDER_VARIABLE):
        # the launch script that made the folder may have ended
        with suppress(OSError):
            Path(folder, os.environ.get("LOCAL_RANK", "0")).write_text(text)
