"""Fixtures: a small model for the bands of synthetic leaves, their latents, and georeferenced images."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin
from typer.testing import CliRunner

from msvae import AutoencoderKLMultispectralAdapter
from msvae.cli import app
from msvae.model.build import TINY_BACKBONE
from msvae.shards.manifest import Manifest

ON_EARTH = {"crs": "EPSG:32643", "transform": from_origin(578_000, 3_419_000, 0.02, 0.02)}


def small_model(statistics: Any, seed: int = 0) -> AutoencoderKLMultispectralAdapter:
    torch.manual_seed(seed)
    return AutoencoderKLMultispectralAdapter(
        **TINY_BACKBONE, adapter_width=8, band_mean=statistics.mean, band_std=statistics.std
    ).eval()


@pytest.fixture(scope="session")
def model_folder(leaf_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "best"
    small_model(Manifest.load(leaf_shards / "train").statistics).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(leaf_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "best"
    small_model(Manifest.load(leaf_shards / "train").statistics, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder) -> AutoencoderKLMultispectralAdapter:
    return AutoencoderKLMultispectralAdapter.from_pretrained(model_folder)


@pytest.fixture
def write_field(model) -> Callable[..., Path]:
    """Return a function that writes an image of leaves and its mask file; options are those of rasterio."""

    def write(path: Path, height: int, width: int, dtype: str = "uint16", **profile: Any) -> Path:
        reflectance, leaf = field(model.config.band_mean, model.config.band_std, height, width)
        scale = 1.0 if dtype == "float32" else 1e-4
        values = (reflectance / scale).clip(min=0).astype(dtype)
        if (nodata := profile.get("nodata")) is not None:
            values[:, ~leaf] = nodata
        else:
            Image.fromarray(leaf).save(path.with_name(f"{path.stem}_mask.png"))
        options = {"driver": "GTiff", "count": 5, "height": height, "width": width, "dtype": dtype}
        with (
            warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning),
            rasterio.open(path, "w", **options, **ON_EARTH, **profile) as raster,
        ):
            raster.write(values)
            raster.scales = (scale,) * 5
            for band, nm in enumerate(model.bands.wavelengths_nm, start=1):
                raster.set_band_description(band, model.bands.names[band - 1])
                raster.update_tags(band, wavelength=str(nm), wavelength_units="nm")
        return path

    return write


def field(mean: Any, std: Any, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return reflectance (5, H, W) and leaf mask of rows of leaves that are similar everywhere, without repetition."""
    rng = np.random.default_rng(height * 10_007 + width)
    y, x = np.mgrid[:height, :width]
    waves = sum(
        np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
        for angle, period, phase in zip(
            rng.uniform(0, np.pi, 12), rng.uniform(6, 40, 12), rng.uniform(0, 2 * np.pi, 12), strict=True
        )
    ) / np.sqrt(6)
    leaf = np.sin(2 * np.pi * x / 27) + 0.5 * waves > -0.3
    noise = rng.normal(0, 0.2, (5, height, width))
    spectra = np.array(mean)[:, None, None] + np.array(std)[:, None, None] * (waves + noise)
    return np.where(leaf, spectra.clip(min=0.002), 0.2), leaf


@pytest.fixture(scope="session")
def latents(model_folder, leaf_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "leaves"
    run("encode", model_folder, leaf_shards, out)
    return out


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2, done.output
    assert done.output.count("\n") == 1
    return done.output


reconstruct, no_reconstruction = partial(run, "reconstruct"), partial(refused, "reconstruct")


def samples(folder: Path) -> dict[str, dict[str, Any]]:
    """Read all members of the tars with `tarfile`."""
    decode = {"npy": lambda raw: np.load(io.BytesIO(raw)), "png": lambda raw: np.asarray(Image.open(io.BytesIO(raw)))}
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, ending = member.name.split(".", 1)
                content = tar.extractfile(member).read()
                found.setdefault(key, {})[ending] = decode.get(ending.split(".")[-1], json.loads)(content)
    return found


def every_byte(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as raster:
        return raster.read()
