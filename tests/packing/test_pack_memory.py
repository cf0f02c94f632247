"""Packing needs bounded memory, however large the raster is."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

SMALL_PX, GROWTH = 1024, 4
MAX_GROWTH_MB = 64
"""The raster grows by 150 MB. Memory may grow by GDAL's cache of 32 MB and one row of tiles."""
PACK = """
import sys
from pathlib import Path
from msvae.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print("PEAK_KB", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
SIMPLE = ["--mask", "ndvi>0.3"]
CLEANED = ["--mask", "otsu(ndvi)", "--min-object-px", "50", "--erode-px", "1"]
KINDS = {
    "tiles": {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"},
    "strips": {"driver": "GTiff", "blockysize": 64, "compress": "deflate", "zlevel": 1},
    "raw": {"driver": "ENVI", "interleave": "bip"},
}


def block(rows):
    """Return 5 bands of (rows, 1024) px, the same for every size. A quarter of the pixels is leaf."""
    values = np.random.default_rng(0).integers(1000, 1400, (5, rows, SMALL_PX), dtype=np.uint16)
    values[4, rows // 2 :, SMALL_PX // 2 :] += np.uint16(3000)
    return values


def write_image(path: Path, side_px: int, kind: str) -> None:
    if kind == "array":
        array = np.lib.format.open_memmap(path, "w+", np.uint16, (5, side_px, side_px))
        for row in range(0, side_px, SMALL_PX):
            array[:, row : row + SMALL_PX] = np.tile(block(SMALL_PX), side_px // SMALL_PX)
        return
    shape = {"count": 5, "height": side_px, "width": side_px, "dtype": "uint16"}
    with (
        warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning),
        rasterio.open(path, "w", **shape, **KINDS[kind]) as raster,
    ):
        for row in range(0, side_px, SMALL_PX):
            rows = np.tile(block(SMALL_PX), side_px // SMALL_PX)
            raster.write(rows, window=Window(0, row, side_px, SMALL_PX))


def peak_mb(image: Path, out: Path, *options: str) -> float:
    """Return the peak resident memory of `msvae pack` in its own process. Small tiles fill the contact sheet."""
    arguments = ["pack", str(image), "--out", str(out), "--scale", "0.0001", "--tile", "64", *options]
    done = subprocess.run([sys.executable, "-c", PACK, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("PEAK_KB")[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("strips", CLEANED),
        ("array", SIMPLE),
        *(pytest.param(kind, SIMPLE, marks=pytest.mark.slow) for kind in KINDS),
        pytest.param("array", CLEANED, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_does_not_grow_with_the_raster(tmp_path, kind, options):
    ending = {"array": "npy", "raw": "dat"}.get(kind, "tif")
    peaks = []
    for side_px in (SMALL_PX, SMALL_PX * GROWTH):
        image = tmp_path / f"{side_px}.{ending}"
        write_image(image, side_px, kind)
        peaks.append(peak_mb(image, tmp_path / f"out_{side_px}", *options))
        image.unlink()
    assert peaks[1] < peaks[0] + MAX_GROWTH_MB, peaks
