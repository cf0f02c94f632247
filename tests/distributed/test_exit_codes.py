"""A lack of memory is reported in one line."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch

from msvae.distributed.exit_codes import out_of_memory_message

SCRIPT = """
import numpy, torch
from msvae.distributed.exit_codes import run_script
run_script(lambda: {0}, "stopped", "take less")
"""


@pytest.mark.parametrize("allocation", ["torch.empty(2**50)", "numpy.empty(2**50)"])
def test_a_script_without_enough_memory_exits_with_2_and_says_how_to_use_less(allocation):
    command = [sys.executable, "-c", SCRIPT.format(allocation)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: too little memory (")
    assert done.stderr.endswith("; take less\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nStack …"),
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors …"), "CUDA error: out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("CUDA error: device-side assert triggered"), None),
    ],
)
def test_every_error_about_a_lack_of_memory_is_recognised(error, message):
    assert out_of_memory_message(error) == message
