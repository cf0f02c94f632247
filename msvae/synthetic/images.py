"""Synthetic images of leaves on soil, with spectra of PROSPECT-D and exact leaf masks."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from rasterio.io import MemoryFile
from rasterio.transform import Affine
from scipy.ndimage import gaussian_filter, shift

from msvae.bands import DEFAULT_NAMES, DEFAULT_WAVELENGTHS_NM
from msvae.files import replace_folder
from msvae.synthetic.leaf_shapes import Leaf, draw_leaf, sample_leaves
from msvae.synthetic.leaf_tissue import sample_health, tissue_reflectance
from msvae.synthetic.textures import Floats, Light, Mask, draw_soil, fractal_noise

MIN_SIZE_PX = 64
REFLECTANCE_SCALE = 1e-4
IMAGE_WIDTH_M = 0.10
COVERAGE_RANGE = (0.30, 0.62)
MAX_RESCALE = 1.4  # more would push most of a narrow leaf out of the image

# Per band. A leaf transmits near infrared, so its shadow is weaker there.
SHADOW_DEPTH = np.array([0.62, 0.58, 0.62, 0.46, 0.36])
SHOT_VARIANCE = 6e-5  # per unit of reflectance
READ_NOISE = 0.0012  # standard deviation, in reflectance
EDGE_BLUR_PX = 0.6


def synthesise(
    out: Path, num_images: int, size_px: int, seed: int, on_image: Callable[[], None] | None = None
) -> list[Path]:
    """Write `leaf_000.tif` (five bands, uint16, reflectance x 10000), `leaf_000_mask.png`, and so on.

    The same seed gives the same bytes, and an image does not depend on how many are made. `out` is written
    completely or not at all. `on_image` is called after every image.

    Returns: the paths of the images, in order.
    Raises: ValueError if an argument is out of range, or if `out` is not empty or cannot be written.
    """
    _check_arguments(num_images, size_px, seed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is in use, expected a new or empty folder; choose another or empty it")
    with replace_folder(out.resolve()) as partial:
        for index in range(num_images):
            _write_image(partial / f"leaf_{index:03d}", *draw_image(size_px, seed, index))
            if on_image is not None:
                on_image()
    return [out / f"leaf_{index:03d}.tif" for index in range(num_images)]


def draw_image(size_px: int, seed: int, index: int) -> tuple[Floats, Mask]:
    """Return image `index` of a series: reflectance (H, W, 5) with noise, and leaf mask (H, W)."""
    rng = np.random.default_rng([seed, index])
    light = Light(azimuth_rad=rng.uniform(-0.9, -0.1) * np.pi, elevation_rad=np.radians(rng.uniform(38, 65)))
    leaves = _fill_image(sample_leaves(rng), rng.uniform(*COVERAGE_RANGE))
    scene = draw_soil(rng, size_px, light)
    leaf_mask = np.zeros((size_px, size_px), dtype=bool)
    for leaf in leaves:
        leaf_mask |= _add_leaf(rng, scene, leaf, light)
    evenness = 1 + 0.04 * fractal_noise(rng, size_px, slope=3.0)
    scene *= np.clip(evenness, 0.85, 1.15)[..., None]
    noise = np.sqrt(SHOT_VARIANCE * scene + READ_NOISE**2) * rng.standard_normal(scene.shape)
    return np.clip(scene + noise, 0.0, 1.0), leaf_mask


def _check_arguments(num_images: int, size_px: int, seed: int) -> None:
    if num_images < 1:
        raise ValueError(f"got {num_images} images, expected at least 1; ask for more")
    if size_px < MIN_SIZE_PX:
        raise ValueError(f"got a size of {size_px} px, expected at least {MIN_SIZE_PX}; ask for larger images")
    if seed < 0:
        raise ValueError(f"got seed {seed}, expected 0 or more; choose another seed")


def _fill_image(leaves: list[Leaf], coverage: float) -> list[Leaf]:
    """Return the leaves, scaled together so that they cover about this share of the image."""
    rescale = 1.0
    for _ in range(5):
        leaf_mask = np.any([draw_leaf(leaf.scaled(rescale), MIN_SIZE_PX).inside for leaf in leaves], axis=0)
        rescale = float(np.clip(rescale * np.sqrt(coverage / leaf_mask.mean()), 0.5, MAX_RESCALE))
    return [leaf.scaled(rescale) for leaf in leaves]


def _add_leaf(rng: np.random.Generator, scene: Floats, leaf: Leaf, light: Light) -> Mask:
    """Add a leaf and its shadow to the scene (H, W, 5), in place, and return the leaf's mask (H, W).

    Pixels of the mask are pure leaf. Pixels just outside of it mix leaf and background, as in a camera.
    """
    size_px = scene.shape[0]
    maps = draw_leaf(leaf, size_px)
    reach_px = rng.uniform(0.015, 0.035) * size_px / np.tan(light.elevation_rad)
    away_yx = (-reach_px * np.sin(light.azimuth_rad), -reach_px * np.cos(light.azimuth_rad))
    shadow = gaussian_filter(shift(maps.inside.astype(np.float64), away_yx, order=1), 0.35 * reach_px)
    scene *= 1 - shadow[..., None] * SHADOW_DEPTH

    wrinkles = 0.0010 * fractal_noise(rng, size_px, slope=2.2, cycles=5)
    lit = light.shading(maps.relief + wrinkles)
    pure = np.zeros_like(scene)
    pure[maps.inside] = tissue_reflectance(rng, maps, sample_health(rng)) * lit[maps.inside, None]

    share = gaussian_filter(maps.inside.astype(np.float64), EDGE_BLUR_PX, truncate=3)
    fringe = (share > 0) & ~maps.inside
    for band in range(scene.shape[-1]):
        spilled = gaussian_filter(pure[..., band], EDGE_BLUR_PX, truncate=3)
        scene[fringe, band] = scene[fringe, band] * (1 - share[fringe]) + spilled[fringe]
    scene[maps.inside] = pure[maps.inside]
    return maps.inside


def _write_image(stem: Path, reflectance: Floats, leaf_mask: Mask) -> None:
    """Write `<stem>.tif` and `<stem>_mask.png`. Both are encoded in memory, so that a full disk raises an error."""
    size_px = leaf_mask.shape[0]
    pixel_m = IMAGE_WIDTH_M / size_px
    stored = np.round(reflectance / REFLECTANCE_SCALE).astype(np.uint16)
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            width=size_px,
            height=size_px,
            count=len(DEFAULT_NAMES),
            dtype="uint16",
            transform=Affine.scale(pixel_m, -pixel_m),
            tiled=True,
            blockxsize=256,
            blockysize=256,
            compress="deflate",
            predictor=2,
        ) as raster:
            raster.write(np.moveaxis(stored, -1, 0))
            raster.descriptions = DEFAULT_NAMES
            raster.scales = (REFLECTANCE_SCALE,) * len(DEFAULT_NAMES)
            for band, wavelength_nm in enumerate(DEFAULT_WAVELENGTHS_NM, start=1):
                raster.update_tags(band, wavelength=str(wavelength_nm), wavelength_units="nm")
        stem.with_name(f"{stem.name}.tif").write_bytes(memory.getbuffer())
    png = io.BytesIO()
    Image.fromarray(np.where(leaf_mask, 255, 0).astype(np.uint8)).save(png, format="PNG")
    stem.with_name(f"{stem.name}_mask.png").write_bytes(png.getvalue())
