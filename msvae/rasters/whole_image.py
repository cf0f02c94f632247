"""Masks that depend on the whole image: Otsu's threshold, removal of small objects, erosion of borders.

Images are read in strips, and masks are files of one bit per pixel. One strip and a
few numbers per object are in memory. The result does not depend on the strips. Thresholds and masks are kept in a
folder, so that other processes and resumed runs reuse them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.filters import threshold_otsu

from msvae.files import partial_path, write_text
from msvae.rasters.images import Image, ImageSet, MaskedImage
from msvae.rasters.masks import BitMask, MaskRule
from msvae.rasters.options import ReadOptions

STRIP_PX = 2**20
"""Pixels of a strip. Labelling objects needs about twenty bytes per pixel of a strip."""
HISTOGRAM_BINS = 256
"""Bins between the smallest and the largest value of an image, as in scikit-image."""
OnPixels = Callable[[int], None]
"""Called with the number of pixels that were read."""


def num_passes(image_set: ImageSet) -> int:
    """Return how often each image is read before the mask of a window is known: two for Otsu, one for cleaning."""
    return 2 * _needs_threshold(image_set.images[0].mask) + _needs_cleaning(image_set.options)


def prepare_masks(image_set: ImageSet, folder: Path) -> ImageSet:
    """Prepare all masks that depend on whole images, in a new `folder`, and return the images with them.

    Raises: ValueError if a file is damaged, or an image has no threshold.
    """
    folder.mkdir(parents=True)
    for index in range(len(image_set.images)):
        prepare_mask(image_set, folder, index, lambda _: None)
    return with_prepared_masks(image_set, folder)


def prepare_mask(image_set: ImageSet, folder: Path, index: int, on_pixels: OnPixels) -> None:
    """Find the threshold of one image, clean its mask, and keep both in `folder`, unless they are there.

    Raises: ValueError if a file is damaged, or the image has no threshold.
    """
    if _threshold_file(folder, index).is_file():
        return
    rule = image_set.images[index].mask
    if _needs_threshold(rule):
        with image_set.open(index) as image:
            rule = replace(rule, threshold=find_threshold(image, on_pixels))
    if _needs_cleaning(image_set.options):
        with image_set.open(index, rule) as image:
            _write_clean_mask(image, image_set.options, _mask_file(folder, index), on_pixels)
    write_text(_threshold_file(folder, index), json.dumps({"threshold": rule.threshold}))


def with_prepared_masks(image_set: ImageSet, folder: Path) -> ImageSet:
    """Return the images with the thresholds and masks that `prepare_mask` kept in `folder`."""

    def with_prepared_mask(index: int, image: Image) -> Image:
        threshold = json.loads(_threshold_file(folder, index).read_text())["threshold"]
        bits = None
        if _needs_cleaning(image_set.options):
            bits = BitMask(_mask_file(folder, index), image.height, image.width)
        return replace(image, mask=replace(image.mask, threshold=threshold, bits=bits))

    images = (with_prepared_mask(index, image) for index, image in enumerate(image_set.images))
    return replace(image_set, images=tuple(images))


def find_threshold(image: MaskedImage, on_pixels: OnPixels) -> float:
    """Return Otsu's threshold over the valid pixels of an image; infinity if none is valid, so that none is leaf.

    Args: on_pixels is called during each of two passes.
    Raises: ValueError if all pixels have the same value.
    """
    low, high = np.inf, -np.inf
    for values in _reported(image.quantity_windows(), on_pixels):
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
    for values in _reported(image.quantity_windows(), on_pixels):
        added, edges = np.histogram(values, HISTOGRAM_BINS, (low, high))
        counts += added
    return float(threshold_otsu(hist=(counts, (edges[:-1] + edges[1:]) / 2)))


def without_small_objects(mask: BitMask, min_px: int) -> Iterator[NDArray[np.bool_]]:
    """Iterate over strips of the mask without objects (pixels connected by sides) of fewer than `min_px` pixels."""
    is_kept, num_before = _object_sizes(mask) >= min_px, 0
    for row, rows in _strips(mask):
        labels, num_labels = ndimage.label(mask.read(row, 0, rows, mask.width))
        yield np.concatenate([[False], is_kept[num_before : num_before + num_labels]])[labels]
        num_before += num_labels


def eroded(mask: BitMask, erode_px: int) -> Iterator[NDArray[np.bool_]]:
    """Iterate over strips of the mask after `erode_px` erosions by one pixel (by sides).

    The edge of the image is not a border, because the pixels beyond it are unknown.
    """
    for row, rows in _strips(mask):
        start, stop = max(0, row - erode_px), min(mask.height, row + rows + erode_px)
        window = mask.read(start, 0, stop - start, mask.width)
        yield ndimage.binary_erosion(window, iterations=erode_px, border_value=1)[row - start : row - start + rows]


def _needs_threshold(rule: MaskRule) -> bool:
    return rule.expression is not None and rule.expression.finds_threshold


def _needs_cleaning(options: ReadOptions) -> bool:
    return options.min_object_px > 1 or options.erode_px > 0


def _threshold_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.json"


def _mask_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.bits"


def _reported(windows: Iterable[NDArray[Any]], on_pixels: OnPixels) -> Iterator[NDArray[Any]]:
    for window in windows:
        on_pixels(window.size)
        yield window


def _write_clean_mask(image: MaskedImage, options: ReadOptions, file: Path, on_pixels: OnPixels) -> None:
    """Write the mask of an image without small objects and with eroded borders. `file` appears when it is complete."""
    partial, width = partial_path(file), image.raster.info.width
    mask = BitMask.write(partial.with_suffix(".leaf"), width, _reported(image.leaf_strips(), on_pixels))
    if options.min_object_px > 1:
        large = BitMask.write(partial.with_suffix(".large"), width, without_small_objects(mask, options.min_object_px))
        mask.remove()
        mask = large
    if options.erode_px > 0:
        inner = BitMask.write(partial.with_suffix(".inner"), width, eroded(mask, options.erode_px))
        mask.remove()
        mask = inner
    mask.file.replace(file)


def _object_sizes(mask: BitMask) -> NDArray[np.int64]:
    """Return the size, in pixels of the whole image, of the object to which each object of each strip belongs."""
    sizes, joins, num_before = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)], 0
    above = np.zeros(mask.width, np.int64)
    for row, rows in _strips(mask):
        labels, num_labels = ndimage.label(mask.read(row, 0, rows, mask.width))
        sizes.append(np.bincount(labels.ravel(), minlength=num_labels + 1)[1:])
        top = np.where(labels[0] > 0, labels[0].astype(np.int64) + num_before, 0)
        touching = (above > 0) & (top > 0)
        joins.append(np.unique(np.stack([above[touching], top[touching]], axis=1), axis=0))
        above = np.where(labels[-1] > 0, labels[-1].astype(np.int64) + num_before, 0)
        num_before += num_labels
    if num_before == 0:
        return sizes[0]
    first, second = (np.concatenate(joins) - 1).T
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(num_before, num_before))
    _, whole = connected_components(graph, directed=False)
    totals = np.bincount(whole, np.concatenate(sizes)).astype(np.int64)
    of_object: NDArray[np.int64] = totals[whole]
    return of_object


def _strips(mask: BitMask) -> Iterator[tuple[int, int]]:
    """Iterate over first row and number of rows of the strips."""
    rows = max(1, STRIP_PX // mask.width)
    for row in range(0, mask.height, rows):
        yield row, min(rows, mask.height - row)
