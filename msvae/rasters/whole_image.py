"""What must be known of a whole image before the mask of any tile is: Otsu's threshold, small objects, the border.

It is found once and kept in a folder, so that other processes, and a run that goes on, need not find it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.filters import threshold_otsu

from msvae.files import partial_path, write_text
from msvae.packing.options import PackOptions
from msvae.packing.survey import bands_of, num_tiles_of
from msvae.rasters.cleaning import BitMask, eroded, without_small_objects
from msvae.rasters.images import DataSet, Image
from msvae.rasters.masks import MaskedImage, MaskRule
from msvae.work_folder import WorkFolder

HISTOGRAM_BINS = 256
"""As in scikit-image, between the extremes of the image."""
Count = Callable[[int], None]


def needs_preparing(data_set: DataSet) -> bool:
    """Whether a tile's mask depends on more than the tile."""
    rule = data_set.images[0].mask
    return _finds_threshold(rule) or _cleans(data_set.options)


def prepare_mask(data_set: DataSet, work: WorkFolder, index: int, count: Count) -> None:
    """Find what only the whole of an image tells of its mask, and keep it in the work folder.

    Raises: ValueError when a file is damaged, or no threshold can be found.
    """
    num_tiles, told = sum(num_tiles_of(data_set, band) for band in bands_of(data_set, index)), 0
    image = data_set.images[index]
    passes = 2 * _finds_threshold(image.mask) + _cleans(data_set.options)
    left_px = all_px = passes * image.height * image.width

    def seen(num_pixels: int) -> None:
        nonlocal left_px, told
        left_px = max(0, left_px - num_pixels)
        tiles = num_tiles * (all_px - left_px) // all_px
        count(tiles - told)
        told = tiles

    _prepare(data_set, work.masks, index, seen)
    seen(left_px)


def prepare_masks(data_set: DataSet, folder: Path) -> DataSet:
    """The data set with all that only whole images tell of their masks; what lies on disk lies in `folder`.

    Raises: ValueError when a file is damaged, or no threshold can be found.
    """
    folder.mkdir(parents=True)
    for index in range(len(data_set.images)):
        _prepare(data_set, folder, index, lambda _: None)
    return prepared(data_set, folder)


def prepared(data_set: DataSet, folder: Path) -> DataSet:
    """The data set with what was found and kept in `folder`."""

    def with_found(index: int, image: Image) -> Image:
        threshold = json.loads(_record(folder, index).read_text())["threshold"]
        bits = BitMask(_bits(folder, index), image.height, image.width) if _cleans(data_set.options) else None
        return replace(image, mask=replace(image.mask, threshold=threshold, prepared=bits))

    return replace(data_set, images=tuple(map(with_found, range(len(data_set.images)), data_set.images)))


def _prepare(data_set: DataSet, folder: Path, index: int, seen: Count) -> None:
    if _record(folder, index).is_file():
        return
    rule = data_set.images[index].mask
    if _finds_threshold(rule):
        with data_set.open(index) as image:
            rule = replace(rule, threshold=find_threshold(image, seen))
    if _cleans(data_set.options):
        with data_set.open(index, rule) as image:
            _write_bits(image, data_set.options, _bits(folder, index), seen)
    write_text(_record(folder, index), json.dumps({"threshold": rule.threshold}))


def _write_bits(image: MaskedImage, options: PackOptions, file: Path, seen: Count) -> None:
    """The cleaned mask of an image; the file is there in full or not at all."""
    partial, width = partial_path(file), image.raster.info.width
    mask = BitMask.write(partial.with_suffix(".leaf"), width, _told(image.leaf_strips(), seen))
    if options.min_object_px > 1:
        large = BitMask.write(partial.with_suffix(".large"), width, without_small_objects(mask, options.min_object_px))
        mask.remove()
        mask = large
    if options.erode_px > 0:
        inner = BitMask.write(partial.with_suffix(".inner"), width, eroded(mask, options.erode_px))
        mask.remove()
        mask = inner
    mask.file.replace(file)


def _told(windows: Iterable[NDArray[Any]], seen: Count) -> Iterator[NDArray[Any]]:
    for window in windows:
        seen(window.size)
        yield window


def _finds_threshold(rule: MaskRule) -> bool:
    return rule.expression is not None and rule.expression.finds_threshold


def _cleans(options: PackOptions) -> bool:
    return options.min_object_px > 1 or options.erode_px > 0


def _record(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.json"


def _bits(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.bits"


def find_threshold(image: MaskedImage, seen: Count) -> float:
    """Otsu's threshold over the valid pixels of an image; infinite where there is none, as nothing is leaf then.

    Args: seen: gets the number of pixels that were read, of each of two passes.
    Raises: ValueError when the quantity is the same everywhere.
    """
    low, high = np.inf, -np.inf
    for values in _told(image.quantity_windows(), seen):
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low > high:
        return np.inf
    if low == high:
        raise ValueError(
            f"{image.raster.source.path} has the same value {low:g} everywhere, so otsu() finds no threshold; "
            "leave the image out, or give a threshold, such as --mask 'ndvi>0.10'"
        )
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    for values in _told(image.quantity_windows(), seen):
        added, edges = np.histogram(values, HISTOGRAM_BINS, (low, high))
        counts += added
    return float(threshold_otsu(hist=(counts, (edges[:-1] + edges[1:]) / 2)))


def threshold_notice(rules: Sequence[MaskRule]) -> str | None:
    """The thresholds that were found, in a line."""
    found = sorted(rule.threshold for rule in rules if rule.threshold is not None and np.isfinite(rule.threshold))
    if not found:
        return None
    text = next(rule.expression.otsu_text() for rule in rules if rule.expression is not None)
    if len(found) == 1:
        return f"{text}: the threshold is {found[0]:.4g}"
    return f"{text}: the threshold is {found[0]:.4g} to {found[-1]:.4g}, by image (median {median(found):.4g})"
