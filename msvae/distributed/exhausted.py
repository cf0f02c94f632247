"""An error that says that memory ran out, of a GPU or of the machine."""

from __future__ import annotations

import errno
import re

import torch

IN_TEXT = re.compile(r"DefaultCPUAllocator: [^.]*|CUDA error: out of memory|\w+_STATUS_ALLOC_FAILED|std::bad_alloc")
"""Of errors that torch does not tell from others by their type."""


def out_of_memory_message(error: BaseException) -> str | None:
    """What was asked for, in one line; None when the error is another one."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return text.splitlines()[0].rstrip(". ") if text else "MemoryError"
    if isinstance(error, OSError):
        return text if error.errno == errno.ENOMEM else None
    found = IN_TEXT.search(text) if isinstance(error, RuntimeError) else None
    return found[0] if found else None
