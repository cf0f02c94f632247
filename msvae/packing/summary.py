"""What packing has made, and every assumption that was made on the way."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from msvae.messages import counted
from msvae.packing.options import SPLITS, PackOptions, PackSummary
from msvae.packing.placement import TARGET_SHARE
from msvae.packing.shards import ShardJob
from msvae.packing.splits import SplitTiles
from msvae.packing.survey import Survey
from msvae.rasters.images import DataSet
from msvae.rasters.whole_image import threshold_notice
from msvae.shards.manifest import Manifest
from msvae.shards.reflectance import brightness_notice

MORE_OF = {
    "group": "pack images of more groups, or give another --group-by",
    "image": "pack more images, or give --split-by block",
    "block": "pack more images, or give a smaller --tile",
}
"""What makes enough of what a data set is split by."""


def summarise(
    data_set: DataSet,
    survey: Survey,
    splits: SplitTiles,
    jobs: Sequence[ShardJob],
    folder: Path,
    shards_missing: int,
    train: Manifest | None = None,
    duplicates: Sequence[str] = (),
) -> PackSummary:
    """The summary of a data set that lies in `folder`; `train` and `duplicates` are known once it is complete."""
    layout, options = data_set.layout, data_set.options
    tiles = {split: of_split for split, of_split in splits.tiles.items() if of_split}
    leaf_pixels = {split: sum(tile.leaf_pixels for tile in of_split) for split, of_split in tiles.items()}
    num_tiles = {split: len(of_split) for split, of_split in tiles.items()}
    dropped = dict(survey.dropped)
    if splits.num_in_gap:
        dropped[f"nearer than {options.gap_px} px to a tile of another split"] = splits.num_in_gap
    return PackSummary(
        out=folder,
        num_images=len(data_set.images),
        bands=layout.bands,
        dtype=layout.dtype,
        scale=layout.scale,
        offset=layout.offset,
        tile_px=options.tile_px,
        split_by=splits.split_by,
        tiles=num_tiles,
        leaf_pixels=leaf_pixels,
        num_shards={split: sum(job.split == split for job in jobs) for split in tiles},
        coverage_mean=sum(leaf_pixels.values()) / (sum(num_tiles.values()) * options.tile_px**2),
        dropped=dropped,
        num_in_gap=splits.num_in_gap,
        leaf_pixels_in_images=survey.leaf_pixels,
        leaf_pixels_covered=survey.covered_pixels,
        leaf_pixels_repeated=sum(tile.leaf_pixels for tile in survey.tiles) - survey.covered_pixels,
        shards_missing=shards_missing,
        num_bytes=sum(file.stat().st_size for file in folder.rglob("[!.]*") if file.is_file()),
        notices=(
            *layout.notices,
            *_notices(data_set, tiles, train, splits.split_by),
            *_thin_leaf(options, survey),
            *duplicates,
        ),
    )


def _thin_leaf(options: PackOptions, survey: Survey) -> Iterator[str]:
    covered = survey.covered_pixels / max(survey.leaf_pixels, 1)
    if options.tiling == "leaf" and covered < TARGET_SHARE:
        yield (
            f"tiles cover {covered:.1%} of the leaf; the rest is too scattered for --min-coverage "
            f"{options.min_coverage:g}, so lower it for {TARGET_SHARE:.0%}"
        )


def _notices(data_set: DataSet, splits: Collection[str], train: Manifest | None, split_by: str) -> Iterator[str]:
    rules = [image.mask for image in data_set.images]
    if (thresholds := threshold_notice(rules)) is not None:
        yield thresholds
    by_validity = sum(1 for rule in rules if rule.file is None and rule.expression is None)
    if by_validity:
        yield (
            f"leaf mask of {by_validity} of {counted(len(data_set.images), 'image')} taken from nodata, NaN or mask "
            "bands: everything else in them counts as leaf"
        )
    if train is not None:
        bright = brightness_notice(train.statistics.mean, data_set.layout.source_dtype)
        if bright is not None:
            yield bright
    for name, share in zip(SPLITS, data_set.options.split, strict=True):
        if share > 0 and name not in splits:
            yield f"no {name} split: too few {split_by}s with leaf for a share of {share:g}; {MORE_OF[split_by]}"
