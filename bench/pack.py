"""MB of shards a second from `msvae pack`, against `cp` of its input bytes in the same run.

What bounds it on one core stands beside: SHA-256 of all bytes, and reading and writing them by way of one array.

python bench/pack.py [--images 12] [--side 2048] [--workers 2] [--coverage 0.5]; medians of rounds that take turns.
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

from msvae.packing.job import pack
from msvae.packing.options import PackOptions

BANDS, TILE_PX, ROUNDS = 5, 256, 5
BUFFER_BYTES = BANDS * TILE_PX**2 * 2
"""Of one tile."""


def write_images(folder: Path, num_images: int, side_px: int, coverage: float) -> None:
    """Smooth 12-bit images in blocks of 256, uncompressed, with discs for leaves."""
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
    """Of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def hash_files(images: Path, _: Path) -> None:
    """SHA-256 of every file, from one buffer."""
    buffer = bytearray(BUFFER_BYTES)
    for file in images.glob("*"):
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as opened:
            while num_bytes := opened.readinto(buffer):
                digest.update(memoryview(buffer)[:num_bytes])


def copy_files(images: Path, copy: Path) -> None:
    """Every file into an array, and from a copy of it into another file."""
    copy.mkdir()
    buffer, copied = np.empty((2, BUFFER_BYTES), np.uint8)
    for file in images.glob("*"):
        with file.open("rb", buffering=0) as opened, (copy / file.name).open("wb", buffering=0) as written:
            while num_bytes := opened.readinto(buffer.data):
                np.copyto(copied, buffer)
                written.write(copied.data[:num_bytes])


def main() -> None:
    """Measure in turns and print the ratio."""
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
        ways: dict[str, Callable[[Path, Path], object]] = {
            "cp": lambda images, out: subprocess.run(["cp", "-r", images, out], check=True),
            "read, copy, write": copy_files,
            "SHA-256": hash_files,
            "msvae pack": lambda images, out: pack([images], out, options),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                began_s = time.perf_counter()
                way(images, out)
                seconds = time.perf_counter() - began_s
                rates[name].append(size_bytes(out if out.exists() else images) / seconds)
                shutil.rmtree(out, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"{name:>17}: {median / medians['cp']:5.2f}x cp ({median / 1e6:.0f} MB/s)")


if __name__ == "__main__":
    main()
