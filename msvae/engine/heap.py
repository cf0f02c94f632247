"""The C library's heap, which holds what layers return on a CPU."""

from __future__ import annotations

import ctypes
import platform

M_MMAP_THRESHOLD = -3
LARGE_BYTES = 2**20


def return_freed_memory() -> None:
    """Have this process give arrays of 1 MiB and more that it makes from now on back to the system once freed.

    glibc raises the size from which it does so as larger arrays are freed (mallopt(3), M_MMAP_THRESHOLD), and keeps
    smaller ones for the next of their size: that takes memory and saves time. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
