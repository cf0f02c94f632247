"""Images of any size through a model and back into files like them, in the memory of a few windows."""

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
from msvae.inference.raster_output import BLOCK_PX, GeoTiff, Npy, RasterOutput, replace_raster
from msvae.inference.sliding_window import TiledModel
from msvae.inference.values import fill_value, leaf_values
from msvae.messages import OnProgress
from msvae.metrics.accumulate import Summary, summarise
from msvae.metrics.spectral import spectral_sums
from msvae.metrics.tile_sums import LeafPixels
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.packing.data_set import DataSet
from msvae.packing.options import PackOptions
from msvae.packing.prepare import prepare_masks
from msvae.rasters.gdal import gdal_session
from msvae.rasters.masks import MaskedImage, parse_mask_option
from msvae.rasters.sources import ImageSource, find_sources

TILE_STEP = 64
"""An eighth of a window, the overlap, is then whole latent cells."""
TIFF_ENDINGS, ARRAY_ENDING = (".tif", ".tiff"), ".npy"
JUDGED_PX = BLOCK_PX
"""Columns that are turned into values of the file and judged at once."""


@dataclass(frozen=True)
class ReconstructOptions:
    """How images go through the model.

    Raises: ValueError for a value that cannot be met.
    """

    tile_px: int = 1024
    """Side of a window. Windows overlap by an eighth; what fits into one is seen whole."""
    batch_size: int = 1
    """Windows that the model takes at once."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` is a GPU where there is one."""
    overwrite: bool = False
    """Replace files that are there."""

    def __post_init__(self) -> None:
        if self.tile_px < 1 or self.tile_px % TILE_STEP:
            raise ValueError(f"got --tile {self.tile_px}, expected a multiple of {TILE_STEP}")
        if self.batch_size < 1:
            raise ValueError(f"got --batch-size {self.batch_size}, expected 1 or more")


class NoLeafError(Exception):
    """An image has no leaf pixel."""


@dataclass(frozen=True)
class Reconstruction:
    """What became of one image: its file and how near that comes, on the leaf, taken as one tile. Without leaf it has
    neither."""

    image: Path
    path: Path | None
    summary: Summary | None
    notices: tuple[str, ...]


def reconstruct(
    model_name: str,
    image: Path,
    out: Path,
    reading: PackOptions,
    options: ReconstructOptions,
    on_progress: OnProgress | None = None,
) -> list[Reconstruction]:
    """Write the reconstruction of an image, or of all images of a folder.

    Args: folder or hub id of a model; a raster, a folder of rasters, or with `reading.band_files` a folder of band
        files; the file to write (.tif, .npy), or a folder in which each image keeps its name, unless two would become
        one file. `on_progress` gets windows done and in all.
    Raises: ValueError, one line, for anything that is wrong with model, images, masks, options or output.
    """
    expression = parse_mask_option(reading.mask)
    sources = find_sources([image], reading.band_files, reading.mask_files)
    targets = _targets(sources, out, reading.axes, options.overwrite)
    model = load_model(model_name, choose_device(options.device))
    with gdal_session(), TemporaryDirectory(prefix="msvae-masks-") as masks:
        described = [describe_image(source, model.bands, reading, expression) for source in sources]
        data_sets = [prepare_masks(each, Path(masks) / str(number)) for number, each in enumerate(described)]
        tiled = [_tiled(model, data_set, options) for data_set in data_sets]
        count = _counter(sum(each.num_windows for each in tiled), on_progress)
        done = [_reconstruct_image(*each, count) for each in zip(tiled, data_sets, targets, strict=True)]
    if not any(each.path for each in done):
        raise ValueError(f"{image} has no leaf pixel; give another --mask")
    return done


def _targets(sources: Sequence[ImageSource], out: Path, axes: str | None, overwrite: bool) -> list[Path]:
    """The file of each image."""
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
            raise ValueError(f"{target} is an image that is read; name another OUT")
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists; name another OUT or give --overwrite")
    return targets


def _named(out: Path, names: Sequence[str], sources: Sequence[ImageSource]) -> list[Path]:
    endings = [ARRAY_ENDING if _is_array(source) else ".tif" for source in sources]
    return [out / f"{name}{ending}" for name, ending in zip(names, endings, strict=True)]


def _is_array(source: ImageSource) -> bool:
    return all(file.suffix.lower() == ARRAY_ENDING for file in source.files)


def _tiled(model: AutoencoderKLMultispectralAdapter, data_set: DataSet, options: ReconstructOptions) -> TiledModel:
    image = data_set.images[0]
    return TiledModel(model, image.height, image.width, options.tile_px, options.tile_px // 8, options.batch_size)


def _counter(total: int, on_progress: OnProgress | None) -> Callable[[int], None]:
    done = 0

    def count(num_windows: int) -> None:
        nonlocal done
        done += num_windows
        if on_progress is not None:
            on_progress(done, total)

    return count


def _reconstruct_image(
    tiled: TiledModel, data_set: DataSet, target: Path, count: Callable[[int], None]
) -> Reconstruction:
    image = data_set.images[0].source.path
    try:
        # read twice: what the model sees runs ahead of what is complete and judged
        with replace_raster(target) as partial, data_set.open(0) as seen, data_set.open(0) as judged:
            with closing(_open_output(partial, target, data_set, judged)) as output:
                tally = _Tally(data_set, judged, output)
                for cols in tiled.swaths():
                    for row, reflectance_CHW in _whole_blocks(tiled.rows(seen, data_set.layout, cols, count)):
                        tally.write(row, cols.start, reflectance_CHW)
            summary = tally.summary()
    except NoLeafError:
        return Reconstruction(image, None, None, ())
    return Reconstruction(image, target, summary, data_set.layout.notices)


def _whole_blocks(
    rows: Iterator[tuple[int, NDArray[np.float32]]],
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The same rows, cut at multiples of the blocks of a file; the last piece may be smaller."""
    kept: NDArray[np.float32] | None = None
    first = 0
    for _, rows_CHW in rows:
        kept = rows_CHW if kept is None else np.concatenate([kept, rows_CHW], axis=1)
        while kept.shape[1] >= BLOCK_PX:
            yield first, kept[:, :BLOCK_PX]
            kept, first = kept[:, BLOCK_PX:], first + BLOCK_PX
    if kept is not None and kept.shape[1]:
        yield first, kept


def _open_output(partial: Path, target: Path, data_set: DataSet, image: MaskedImage) -> RasterOutput:
    layout, (described,) = data_set.layout, data_set.images
    # GDAL has no half precision
    dtype = "float32" if layout.source_dtype == "float16" else layout.source_dtype
    shape = (described.height, described.width)
    if target.suffix.lower() == ARRAY_ENDING:
        axes = data_set.options.axes if data_set.options.axes and _is_array(described.source) else "chw"
        return Npy(partial, (len(layout.bands), *shape), layout.source_dtype, axes)
    info = image.raster.info
    nodata = _nodata(described.positions, image)
    return GeoTiff(
        partial,
        shape,
        dtype,
        layout.bands,
        tuple(info.scales[i] for i in described.positions),
        tuple(info.offsets[i] for i in described.positions),
        nodata,
        image.raster.georeference(),
        has_mask=fill_value(layout.source_dtype, nodata) == 0 and nodata is None,
    )


def _nodata(positions: Sequence[int], image: MaskedImage) -> float | int | None:
    """The first that a band states: a GeoTIFF has one for all."""
    return next((value for i in positions if (value := image.raster.nodata[i]) is not None), None)


class _Tally:
    """Writes what is complete, and keeps the sums of how near it comes to the image."""

    def __init__(self, data_set: DataSet, image: MaskedImage, output: RasterOutput) -> None:
        self._layout, self._image, self._output = data_set.layout, image, output
        self._nodata = _nodata(data_set.images[0].positions, image)
        # one array each: what lives on from each block would leave the freed outputs of layers in holes too small
        self._sums: dict[str, NDArray[np.float64]] = {}

    def write(self, row: int, col: int, reflectance_CHW: NDArray[np.float32]) -> None:
        """Rows of a swath whose first pixel is at `row`, `col`."""
        for left in range(0, reflectance_CHW.shape[2], JUDGED_PX):
            piece_CHW = reflectance_CHW[..., left : left + JUDGED_PX]
            stored_CHW, leaf_HW = self._image.read(row, col + left, *piece_CHW.shape[1:])
            values_CHW = leaf_values(piece_CHW, leaf_HW, self._layout, self._nodata)
            self._output.write(row, col + left, values_CHW, leaf_HW)
            self._judge(values_CHW, stored_CHW, leaf_HW)

    def summary(self) -> Summary:
        """What the sums come to. Raises: NoLeafError."""
        if not self._sums["num_pixels"].any():
            raise NoLeafError
        return summarise(self._sums)

    def _judge(
        self, values_CHW: NDArray[np.generic], stored_CHW: NDArray[np.generic], leaf_HW: NDArray[np.bool_]
    ) -> None:
        recon, target = (
            torch.from_numpy(self._layout.reflectance(stored))[None]
            for stored in (self._layout.store(values_CHW), stored_CHW)
        )
        leaf = torch.from_numpy(leaf_HW)[None, None]
        for name, total in spectral_sums(LeafPixels.of(recon, target, leaf), self._layout.bands).items():
            if name in self._sums:
                self._sums[name] += total.numpy()
            else:
                self._sums[name] = total.numpy()
