"""What must be known of a whole image before the mask of any tile is: Otsu's threshold, small objects, the border."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from skimage.filters import threshold_otsu

from msvae.pack.cleaning import BitMask, eroded, without_small_objects
from msvae.pack.masks import MaskedImage, MaskRule
from msvae.pack.options import PackOptions

HISTOGRAM_BINS = 256
"""As in scikit-image, between the extremes of the image."""


def prepare_rule(
    rule: MaskRule, open_image: Callable[[MaskRule], MaskedImage], options: PackOptions, folder: Path
) -> MaskRule:
    """The rule with all that only the whole image tells. Masks on disk, one bit a pixel, go into `folder`.

    Raises: ValueError when a file is damaged, or no threshold can be found.
    """
    if rule.expression is not None and rule.expression.finds_threshold:
        with open_image(rule) as image:
            rule = replace(rule, threshold=find_threshold(image))
    if options.min_object_px <= 1 and options.erode_px == 0:
        return rule
    folder.mkdir(parents=True)
    with open_image(rule) as image:
        width = image.raster.info.width
        mask = BitMask.write(folder / "leaf", width, image.leaf_strips())
    if options.min_object_px > 1:
        large = BitMask.write(folder / "large", width, without_small_objects(mask, options.min_object_px))
        mask.remove()
        mask = large
    if options.erode_px > 0:
        inner = BitMask.write(folder / "inner", width, eroded(mask, options.erode_px))
        mask.remove()
        mask = inner
    return replace(rule, prepared=mask)


def find_threshold(image: MaskedImage) -> float:
    """Otsu's threshold over the valid pixels of an image; infinite where there is none, as nothing is leaf then.

    Raises: ValueError when the quantity is the same everywhere.
    """
    low, high = np.inf, -np.inf
    for values in image.quantity_windows():
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
    for values in image.quantity_windows():
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
