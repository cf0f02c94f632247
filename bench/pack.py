"""Measure the rate of `msvae pack` relative to `cp` of its input in the same run.

python bench/pack.py [--images 12] [--side 2048] [--workers 2] [--coverage 0.5]

Prints medians of rounds that take turns. Two limits on one core are measured as well: SHA-256 of all bytes, and a copy
of all bytes through one array.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack

BANDS, TILE_PX, ROUNDS = 5, 256, 5
BUFFER_BYTES = BANDS * TILE_PX**2 * 2
"""Size of one tile."""


def write_images(folder: Path, num_images: int, side_px: int, coverage: float) -> None:
    """Write uncompressed 12-bit images of random values in blocks of 256 px, with masks of discs."""
    random = np.random.default_rng(0)
    rows, cols = np.mgrid[:side_px, :side_px]
    for number in range(num_images):
        values = random.integers(0, 4096, (BANDS, side_px, side_px), dtype=np.uint16)
        radius_px = TILE_PX * np.sqrt(coverage / np.pi)
        leaf = (rows % TILE_PX - TILE_PX / 2) ** 2 + (cols % TILE_PX - TILE_PX / 2) ** 2 < radius_px**2
        shape = {"count": BANDS, "height": side_px, "width": side_px, "dtype": "uint16"}
        blocks = {"tiled": True, "blockxsize": 256, "blockysize": 256, "interleave": "band"}
        with rasterio.open(folder / f"field{number:03d}.tif", "w", driver="GTiff", **shape, **blocks) as raster:
            raster.write(values)
            raster.scales = (1e-4,) * BANDS
        Image.fromarray(leaf).save(folder / f"field{number:03d}_mask.png")


def size_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def hash_files(images: Path, _: Path) -> None:
    """Compute the SHA-256 of every file through one buffer."""
    buffer = bytearray(BUFFER_BYTES)
    for file in images.glob("*"):
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as opened:
            while num_bytes := opened.readinto(buffer):
                digest.update(memoryview(buffer)[:num_bytes])


def copy_files(images: Path, copy: Path) -> None:
    """Copy every file: read it into an array, copy the array, and write the copy."""
    copy.mkdir()
    buffer, copied = np.empty((2, BUFFER_BYTES), np.uint8)
    for file in images.glob("*"):
        with file.open("rb", buffering=0) as opened, (copy / file.name).open("wb", buffering=0) as written:
            while num_bytes := opened.readinto(buffer.data):
                np.copyto(copied, buffer)
                written.write(copied.data[:num_bytes])


def main() -> None:
    """Measure in turns and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--coverage", type=float, default=0.5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    with tempfile.TemporaryDirectory() as temporary:
        images, out = (Path(temporary) / name for name in ("images", "out"))
        images.mkdir()
        write_images(images, arguments.images, arguments.side, arguments.coverage)
        options = PackOptions(tile_px=TILE_PX, num_workers=arguments.workers)
        methods: dict[str, Callable[[Path, Path], object]] = {
            "cp": lambda images, out: subprocess.run(["cp", "-r", images, out], check=True),
            "read, copy, write": copy_files,
            "SHA-256": hash_files,
            "msvae pack": lambda images, out: pack([images], out, options),
        }
        rates: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(ROUNDS):
            for name, method in methods.items():
                began_s = time.perf_counter()
                method(images, out)
                seconds = time.perf_counter() - began_s
                rates[name].append(size_bytes(out if out.exists() else images) / seconds)
                shutil.rmtree(out, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"{name:>17}: {median / medians['cp']:5.2f}x cp ({median / 1e6:.0f} MB/s)")


if __name__ == "__main__":
    main()
