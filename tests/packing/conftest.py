"""Fixtures: small rasters with known content, and a reader of packed tars that does not use the package."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

WAVELENGTHS_NM = (475.0, 560.0, 668.0, 717.0, 840.0)
WriteRaster = Callable[..., Path]


@pytest.fixture
def write_raster() -> WriteRaster:
    """Return a function that writes (C, H, W) values as a tif, with metadata and optionally a mask (H, W)."""

    def write(
        path: Path,
        values_CHW: NDArray[Any],
        wavelengths_nm: tuple[float, ...] | None = WAVELENGTHS_NM,
        names: tuple[str, ...] = (),
        mask: NDArray[np.bool_] | None = None,
        scale: float | None = None,
        units: str = "nm",
        **profile: Any,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        count, height, width = values_CHW.shape
        shape = {"count": count, "height": height, "width": width, "dtype": values_CHW.dtype}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, "w", **({"driver": "GTiff"} | shape | profile)) as raster:
                raster.write(values_CHW)
                if scale is not None:
                    raster.scales = (scale,) * count
                for band, name in enumerate(names, start=1):
                    raster.set_band_description(band, name)
                for band, nm in enumerate(wavelengths_nm or (), start=1):
                    raster.update_tags(band, wavelength=str(nm), wavelength_units=units)
        if mask is not None:
            Image.fromarray(mask).save(path.with_name(f"{path.stem}_mask.png"))
        return path

    return write


@pytest.fixture
def leaf_image(write_raster: WriteRaster) -> WriteRaster:
    """Return a function that writes a random uint16 image with a random leaf mask of about half its pixels."""

    def write(path: Path, size_px: int = 64, seed: int = 0, **options: Any) -> Path:
        rng = np.random.default_rng(seed)
        values = rng.integers(0, 10_000, (5, size_px, size_px), dtype=np.uint16)
        options = {"mask": rng.random((size_px, size_px)) < 0.5, "scale": 0.0001} | options
        return write_raster(path, values, **options)

    return write


@pytest.fixture
def on_earth() -> dict[str, Any]:
    """Return the profile of a georeferenced raster: 2 cm pixels in UTM 43N."""
    return {"crs": "EPSG:32643", "transform": from_origin(578_000, 3_419_000, 0.02, 0.02)}


@pytest.fixture
def read_tars() -> Callable[[Path], dict[str, dict[str, Any]]]:
    """Return a function that reads a split with `tarfile` alone: key -> bands (C, H, W), mask (H, W), json."""

    def read(folder: Path) -> dict[str, dict[str, Any]]:
        samples: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, ending = member.name.split(".", 1)
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    decode: dict[str, Callable[[bytes], Any]] = {
                        "bands.npy": lambda raw: np.load(io.BytesIO(raw)),
                        "mask.png": lambda raw: np.asarray(Image.open(io.BytesIO(raw))),
                        "json": json.loads,
                    }
                    samples.setdefault(key, {})[ending] = decode[ending](content)
        return samples

    return read
