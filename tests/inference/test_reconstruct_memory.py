"""Peak memory of `msvae reconstruct` does not grow with the raster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

from .conftest import ON_EARTH

SMALL_PX, GROWTH = 512, 4
MAX_GROWTH_MB = 64
"""Allowance for the cache of GDAL and two slabs of rows. The raster grows by 37 MB, and its float copy by 75 MB."""
RECONSTRUCT = """
import sys
from pathlib import Path
from msvae.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print("PEAK_KB", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def write_image(path: Path, side_px: int) -> None:
    block = np.random.default_rng(0).integers(300, 5000, (5, SMALL_PX, SMALL_PX), dtype=np.uint16)
    shape = {"driver": "GTiff", "count": 5, "height": side_px, "width": side_px, "dtype": "uint16"}
    with rasterio.open(path, "w", **shape, **ON_EARTH, nodata=0, tiled=True) as raster:
        raster.scales = (1e-4,) * 5
        for row in range(0, side_px, SMALL_PX):
            for col in range(0, side_px, SMALL_PX):
                raster.write(block, window=Window(col, row, SMALL_PX, SMALL_PX))


def peak_mb(model: Path, image: Path, out: Path) -> float:
    arguments = ["reconstruct", str(model), str(image), str(out), "--tile", "256"]
    done = subprocess.run([sys.executable, "-c", RECONSTRUCT, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("PEAK_KB")[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_stays_flat_as_the_raster_grows_sixteenfold(model_folder, tmp_path):
    peaks = []
    for side_px in (SMALL_PX, SMALL_PX * GROWTH):
        image = tmp_path / f"{side_px}.tif"
        write_image(image, side_px)
        peaks.append(peak_mb(model_folder, image, tmp_path / f"out-{side_px}.tif"))
    assert peaks[1] < peaks[0] + MAX_GROWTH_MB, peaks
