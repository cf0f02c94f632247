"""Members of samples, and tars in the formats of other writers."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Members = list[tuple[str, bytes]]


def npy(array: NDArray[Any]) -> bytes:
    """A `.npy` file, also of Python objects, which every reader must refuse."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def png(mask: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


def palette_png(indices: NDArray[np.uint8], palette: list[int]) -> bytes:
    """An indexed PNG whose palette lists red, green and blue of each index."""
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def random_tile(seed: int, bands: int = 5, side: int = 16) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 10_000, (bands, side, side), dtype=np.uint16), rng.random((side, side)) < 0.5


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """Writes named contents with `tarfile`, in a format of its own."""

    def write(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=form) as tar:
            for name, content in members:
                header = tarfile.TarInfo(name)
                header.size, header.mtime = len(content), 1234567890.25
                tar.addfile(header, io.BytesIO(content))
        return path

    return write
