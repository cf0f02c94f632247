"""An error that says that memory ran out, of a GPU or of the machine."""

from __future__ import annotations

import re

import torch

FROM_CPU = re.compile(r"DefaultCPUAllocator: [^.]*")


def told_of_memory(error: BaseException) -> str | None:
    """What was asked for, in one line; None when the error is another one."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return text.splitlines()[0].rstrip(". ") if text else "MemoryError"
    found = FROM_CPU.search(text) if isinstance(error, RuntimeError) else None
    return found[0] if found else None
