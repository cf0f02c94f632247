"""Versions of the libraries that can change a result."""

from __future__ import annotations

import importlib.metadata
import platform

LIBRARIES = ("msvae", "torch", "diffusers", "accelerate", "deepspeed", "numpy", "rasterio")


def library_versions() -> dict[str, str]:
    """Return the version of Python and of every library in `LIBRARIES`, or `not installed`."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
