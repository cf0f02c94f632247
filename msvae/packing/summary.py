"""The summary of a packed dataset, with every assumption that was made."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from msvae.bands import Bands
from msvae.messages import counted
from msvae.packing.options import PackOptions
from msvae.packing.shards import ShardPlan
from msvae.packing.splits import SplitTiles
from msvae.packing.survey import Survey
from msvae.packing.tiling import TARGET_SHARE
from msvae.packing.workers import PackJob
from msvae.rasters.masks import MaskRule
from msvae.shards.manifest import Manifest
from msvae.shards.reflectance import brightness_notice
from msvae.shards.splits import SPLITS

HOW_TO_GET_MORE = {
    "group": "pack images of more groups, or give another --group-by",
    "image": "pack more images, or give --split-by block",
    "block": "pack more images, or give a smaller --tile",
}
"""Advice for a dataset with too few units to fill all splits, by the kind of unit."""


@dataclass(frozen=True)
class PackSummary:
    """Result of packing. Dictionaries by split hold only splits that were written."""

    out: Path
    num_images: int
    bands: Bands
    dtype: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    tile_px: int
    split_by: str
    tiles: dict[str, int]
    leaf_pixels: dict[str, int]
    num_shards: dict[str, int]
    coverage_mean: float
    """Mean share of leaf pixels over the tiles of all splits."""
    dropped: dict[str, int]
    """Number of dropped tiles (or whole images) by reason."""
    num_in_gap: int
    """Dropped tiles that were too near to another split."""
    leaf_pixels_in_images: int
    """Leaf pixels of all images, in tiles or not."""
    leaf_pixels_covered: int
    """Leaf pixels in at least one tile, including tiles that were dropped for the gap."""
    leaf_pixels_repeated: int
    """Additional copies of leaf pixels where these tiles overlap."""
    shards_missing: int
    """Shards that other parts have not made yet. There is no output before all are made."""
    num_bytes: int
    notices: tuple[str, ...]
    """Assumptions and omissions, one line each."""


def summarise(
    job: PackJob,
    survey: Survey,
    splits: SplitTiles,
    plans: Sequence[ShardPlan],
    shards_missing: int,
    train: Manifest | None = None,
    duplicates: Sequence[str] = (),
) -> PackSummary:
    """Return the summary of the dataset in the work folder.

    Args: `train` and `duplicates` are the training manifest and the notices about equal tiles of a complete dataset.
    """
    pixel_format, options = job.image_set.pixel_format, job.options
    tiles = {split: of_split for split, of_split in splits.tiles.items() if of_split}
    leaf_pixels = {split: sum(tile.leaf_pixels for tile in of_split) for split, of_split in tiles.items()}
    num_tiles = {split: len(of_split) for split, of_split in tiles.items()}
    dropped = dict(survey.dropped)
    if splits.num_in_gap:
        dropped[f"nearer than {options.gap_px} px to a tile of another split"] = splits.num_in_gap
    return PackSummary(
        out=job.work.data,
        num_images=len(job.image_set.images),
        bands=pixel_format.bands,
        dtype=pixel_format.dtype,
        scale=pixel_format.scale,
        offset=pixel_format.offset,
        tile_px=options.tile_px,
        split_by=splits.split_by,
        tiles=num_tiles,
        leaf_pixels=leaf_pixels,
        num_shards={split: sum(plan.split == split for plan in plans) for split in tiles},
        coverage_mean=sum(leaf_pixels.values()) / (sum(num_tiles.values()) * options.tile_px**2),
        dropped=dropped,
        num_in_gap=splits.num_in_gap,
        leaf_pixels_in_images=survey.leaf_pixels,
        leaf_pixels_covered=survey.covered_pixels,
        leaf_pixels_repeated=sum(tile.leaf_pixels for tile in survey.tiles) - survey.covered_pixels,
        shards_missing=shards_missing,
        num_bytes=sum(file.stat().st_size for file in job.work.data.rglob("[!.]*") if file.is_file()),
        notices=(
            *pixel_format.notices,
            *_mask_notices([image.mask for image in job.image_set.images]),
            *_brightness_notices(train, pixel_format.source_dtype),
            *_split_notices(options, tiles, splits.split_by),
            *_coverage_notices(options, survey),
            *duplicates,
        ),
    )


def _mask_notices(rules: Sequence[MaskRule]) -> Iterator[str]:
    thresholds = sorted(rule.threshold for rule in rules if rule.threshold is not None and np.isfinite(rule.threshold))
    if thresholds:
        text = next(rule.expression.otsu_text() for rule in rules if rule.expression is not None)
        lowest, highest = thresholds[0], thresholds[-1]
        if len(thresholds) == 1:
            yield f"{text}: the threshold is {lowest:.4g}"
        else:
            middle = median(thresholds)
            yield f"{text}: the threshold is {lowest:.4g} to {highest:.4g}, by image (median {middle:.4g})"
    num_by_validity = sum(1 for rule in rules if rule.file is None and rule.expression is None)
    if num_by_validity:
        yield (
            f"leaf mask of {num_by_validity} of {counted(len(rules), 'image')} taken from nodata, NaN or mask "
            "bands: all other pixels of these images count as leaf"
        )


def _brightness_notices(train: Manifest | None, source_dtype: str) -> Iterator[str]:
    if train is not None and (notice := brightness_notice(train.statistics.mean, source_dtype)) is not None:
        yield notice


def _split_notices(options: PackOptions, splits: Collection[str], split_by: str) -> Iterator[str]:
    for name, share in zip(SPLITS, options.split, strict=True):
        if share > 0 and name not in splits:
            yield (
                f"no {name} split: too few {split_by}s with leaf for a share of {share:g}; {HOW_TO_GET_MORE[split_by]}"
            )


def _coverage_notices(options: PackOptions, survey: Survey) -> Iterator[str]:
    covered = survey.covered_pixels / max(survey.leaf_pixels, 1)
    if options.tiling == "leaf" and covered < TARGET_SHARE:
        yield (
            f"tiles cover {covered:.1%} of the leaf; the rest is too scattered for --min-coverage "
            f"{options.min_coverage:g}, so lower it for {TARGET_SHARE:.0%}"
        )
