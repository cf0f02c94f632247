"""Reconstruct images of any size into files of the same type, in the memory of a few windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from msvae.inference.image_bands import describe_image
from msvae.inference.load import choose_device, load_model
from msvae.inference.raster_output import (
    BLOCK_PX,
    GeoTiff,
    Npy,
    RasterOutput,
    fill_value,
    leaf_values,
    replace_raster,
)
from msvae.inference.sliding_window import SlidingWindow
from msvae.messages import OnProgress
from msvae.metrics.aggregate import Summary, summarise
from msvae.metrics.tile_sums import LeafPixels, spectral_sums
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.rasters.gdal import gdal_session
from msvae.rasters.images import ImageSet, MaskedImage
from msvae.rasters.masks import parse_mask_option
from msvae.rasters.options import ReadOptions
from msvae.rasters.sources import ImageSource, find_sources
from msvae.rasters.whole_image import prepare_masks

TILE_STEP = 64
"""Sides of windows are multiples of this, so that the overlap, an eighth of a window, is whole latent cells."""
TIFF_ENDINGS, ARRAY_ENDING = (".tif", ".tiff"), ".npy"


@dataclass(frozen=True)
class ReconstructOptions:
    """How images are reconstructed.

    Raises: ValueError if a value is not allowed.
    """

    tile_px: int = 1024
    """Side of a window, in pixels. Windows overlap by an eighth. A smaller image is reconstructed in one window."""
    batch_size: int = 1
    """Number of windows in a forward pass."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto` for a GPU if there is one."""
    overwrite: bool = False
    """Replace existing files instead of refusing to."""

    def __post_init__(self) -> None:
        if self.tile_px < 1 or self.tile_px % TILE_STEP:
            raise ValueError(f"got --tile {self.tile_px}, expected a multiple of {TILE_STEP}")
        if self.batch_size < 1:
            raise ValueError(f"got --batch-size {self.batch_size}, expected 1 or more")


class _NoLeafError(Exception):
    """Raised in the block that writes a file, so that no file is kept for an image without leaf pixels."""


@dataclass(frozen=True)
class Reconstruction:
    """Result for one image."""

    image: Path
    path: Path | None
    """File of the reconstruction; None if the image has no leaf pixel."""
    summary: Summary | None
    """Metrics of the file against the image over leaf pixels; None if the image has no leaf pixel."""
    notices: tuple[str, ...]
    """Assumptions about bands, scale and mask that the user should check."""


def reconstruct(
    model_name: str,
    image: Path,
    out: Path,
    reading: ReadOptions,
    options: ReconstructOptions,
    on_progress: OnProgress | None = None,
) -> list[Reconstruction]:
    """Write the reconstruction of an image, or of all images of a folder.

    Args:
        model_name: folder or hub id of a model.
        image: a raster, a folder of rasters, or with `reading.band_files` a folder of band files.
        out: the file to write (.tif, .npy), or a folder in which each image keeps its name. Names are longer if two
            images would otherwise have the same file.
        reading: options for bands, values and masks.
        options: options for windows, device and output.
        on_progress: called with the number of finished and of all windows.
    Raises: ValueError if model, images, masks, options or output do not fit, or if no image has a leaf pixel.
    """
    expression = parse_mask_option(reading.mask)
    sources = find_sources([image], reading.band_files, reading.mask_files)
    targets = _targets(sources, out, reading.axes, options.overwrite)
    model = load_model(model_name, choose_device(options.device))
    with gdal_session(), TemporaryDirectory(prefix="msvae-masks-") as masks:
        described = [describe_image(source, model.bands, reading, expression) for source in sources]
        image_sets = [prepare_masks(each, Path(masks) / str(number)) for number, each in enumerate(described)]
        sliding = [_sliding_window(model, image_set, options) for image_set in image_sets]
        count_windows = _counter(sum(each.num_windows for each in sliding), on_progress)
        done = [_reconstruct_image(*each, count_windows) for each in zip(sliding, image_sets, targets, strict=True)]
    if not any(each.path for each in done):
        raise ValueError(f"{image} has no leaf pixel; give another --mask")
    return done


def _targets(sources: Sequence[ImageSource], out: Path, axes: str | None, overwrite: bool) -> list[Path]:
    """Return the file to write for each image."""
    if out.suffix.lower() in (*TIFF_ENDINGS, ARRAY_ENDING) and not out.is_dir():
        if len(sources) > 1:
            raise ValueError(f"{out} is one file for {len(sources)} images; name a folder")
        targets = [out]
    else:
        if out.is_file():
            raise ValueError(f"{out} is a file; name a folder, or a file that ends in .tif or .npy")
        targets = _named(out, [source.stem for source in sources], sources)
        if len(set(targets)) < len(targets):
            targets = _named(out, [source.name for source in sources], sources)
    inputs = {file.resolve() for source in sources for file in source.files}
    for target in targets:
        if target.resolve() in inputs:
            raise ValueError(f"{target} is also an input image; name another OUT")
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists; name another OUT or give --overwrite")
    return targets


def _named(out: Path, names: Sequence[str], sources: Sequence[ImageSource]) -> list[Path]:
    endings = [ARRAY_ENDING if _is_array(source) else ".tif" for source in sources]
    return [out / f"{name}{ending}" for name, ending in zip(names, endings, strict=True)]


def _is_array(source: ImageSource) -> bool:
    return all(file.suffix.lower() == ARRAY_ENDING for file in source.files)


def _sliding_window(
    model: AutoencoderKLMultispectralAdapter, image_set: ImageSet, options: ReconstructOptions
) -> SlidingWindow:
    image = image_set.images[0]
    return SlidingWindow(model, image.height, image.width, options.tile_px, options.tile_px // 8, options.batch_size)


def _counter(total: int, on_progress: OnProgress | None) -> Callable[[int], None]:
    done = 0

    def count(num_windows: int) -> None:
        nonlocal done
        done += num_windows
        if on_progress is not None:
            on_progress(done, total)

    return count


def _reconstruct_image(
    sliding: SlidingWindow, image_set: ImageSet, target: Path, count_windows: Callable[[int], None]
) -> Reconstruction:
    image = image_set.images[0].source.path
    try:
        # opened twice, because the model reads rows ahead of those that are complete and evaluated
        with replace_raster(target) as partial, image_set.open(0) as model_input, image_set.open(0) as original:
            with closing(_open_output(partial, target, image_set, original)) as output:
                writer = _EvaluatingWriter(image_set, original, output)
                for cols in sliding.swaths():
                    rows = sliding.rows(model_input, image_set.pixel_format, cols, count_windows)
                    for row, reflectance_CHW in _whole_blocks(rows):
                        writer.write(row, cols.start, reflectance_CHW)
            summary = writer.summary()
    except _NoLeafError:
        return Reconstruction(image, None, None, ())
    return Reconstruction(image, target, summary, image_set.pixel_format.notices)


def _whole_blocks(
    rows: Iterator[tuple[int, NDArray[np.float32]]],
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the same rows in groups of `BLOCK_PX` rows. The last group may be smaller."""
    buffered: NDArray[np.float32] | None = None
    first = 0
    for _, rows_CHW in rows:
        buffered = rows_CHW if buffered is None else np.concatenate([buffered, rows_CHW], axis=1)
        while buffered.shape[1] >= BLOCK_PX:
            yield first, buffered[:, :BLOCK_PX]
            buffered, first = buffered[:, BLOCK_PX:], first + BLOCK_PX
    if buffered is not None and buffered.shape[1]:
        yield first, buffered


def _open_output(partial: Path, target: Path, image_set: ImageSet, image: MaskedImage) -> RasterOutput:
    pixel_format, (described,) = image_set.pixel_format, image_set.images
    # GDAL has no half precision
    dtype = "float32" if pixel_format.source_dtype == "float16" else pixel_format.source_dtype
    shape = (described.height, described.width)
    if target.suffix.lower() == ARRAY_ENDING:
        axes = image_set.options.axes if image_set.options.axes and _is_array(described.source) else "chw"
        return Npy(partial, (len(pixel_format.bands), *shape), pixel_format.source_dtype, axes)
    info = image.raster.info
    nodata = _nodata(described.band_indices, image)
    return GeoTiff(
        partial,
        shape,
        dtype,
        pixel_format.bands,
        tuple(info.scales[i] for i in described.band_indices),
        tuple(info.offsets[i] for i in described.band_indices),
        nodata,
        image.raster.georeference(),
        has_mask=fill_value(pixel_format.source_dtype, nodata) == 0 and nodata is None,
    )


def _nodata(band_indices: Sequence[int], image: MaskedImage) -> float | int | None:
    """Return the nodata value of the first band that has one, because a GeoTIFF has one value for all bands."""
    return next((value for i in band_indices if (value := image.raster.nodata[i]) is not None), None)


class _EvaluatingWriter:
    """Writes complete rows to a file, and accumulates the metrics of the file against the image."""

    def __init__(self, image_set: ImageSet, original: MaskedImage, output: RasterOutput) -> None:
        self._pixel_format, self._original, self._output = image_set.pixel_format, original, output
        self._nodata = _nodata(image_set.images[0].band_indices, original)
        # one array per metric: keeping the arrays of every block would fragment the memory that layers free
        self._sums: dict[str, NDArray[np.float64]] = {}

    def write(self, row: int, col: int, reflectance_CHW: NDArray[np.float32]) -> None:
        """Write and evaluate reflectance whose first pixel is at `row` and `col`, block by block."""
        for left in range(0, reflectance_CHW.shape[2], BLOCK_PX):
            block_CHW = reflectance_CHW[..., left : left + BLOCK_PX]
            stored_CHW, leaf_HW = self._original.read(row, col + left, *block_CHW.shape[1:])
            values_CHW = leaf_values(block_CHW, leaf_HW, self._pixel_format, self._nodata)
            self._output.write(row, col + left, values_CHW, leaf_HW)
            self._evaluate(values_CHW, stored_CHW, leaf_HW)

    def summary(self) -> Summary:
        """Return the metrics over all leaf pixels that were written.

        Raises: _NoLeafError if there are none.
        """
        if not self._sums["num_pixels"].any():
            raise _NoLeafError
        return summarise(self._sums)

    def _evaluate(
        self, values_CHW: NDArray[np.generic], stored_CHW: NDArray[np.generic], leaf_HW: NDArray[np.bool_]
    ) -> None:
        recon, target = (
            torch.from_numpy(self._pixel_format.reflectance(stored))[None]
            for stored in (self._pixel_format.store(values_CHW), stored_CHW)
        )
        leaf = torch.from_numpy(leaf_HW)[None, None]
        for name, total in spectral_sums(
            LeafPixels.from_tensors(recon, target, leaf), self._pixel_format.bands
        ).items():
            if name in self._sums:
                self._sums[name] += total.numpy()
            else:
                self._sums[name] = total.numpy()
