"""A heap that is asked to keeps no memory that nothing lives in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREE_64_MIB_BELOW_SOMETHING_ALIVE = """
import os, sys, torch
from msvae.engine.heap import return_freed_memory
if sys.argv[1] == "asked":
    return_freed_memory()
def resident_mb():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
torch.ones(6 * 2**20)
before_mb = resident_mb()
arrays = [torch.ones(2**20) for _ in range(16)]
alive = torch.ones(2**17)
del arrays
print(resident_mb() - before_mb)
"""


def kept_mb(way: str) -> float:
    command = [sys.executable, "-c", FREE_64_MIB_BELOW_SOMETHING_ALIVE, way]
    return float(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_arrays_go_back_to_the_system_at_once_when_asked():
    assert kept_mb("asked") < 4
    assert kept_mb("not asked") > 48
