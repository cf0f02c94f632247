"""Packing: rasters and leaf masks become the shards of a data set.

Two passes over the images: the survey decides which tiles go where, the second pass writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.pack.expression import Expression
from msvae.pack.gdal import gdal_session
from msvae.pack.layout import Layout, first_layout, fit_layout
from msvae.pack.masks import MaskedImage, MaskRule, choose_mask, no_mask_error, parse_mask_option
from msvae.pack.options import SPLITS, PackOptions, PackSummary
from msvae.pack.output import check_output, replacing_folder
from msvae.pack.prepare import prepare_rule, threshold_notice
from msvae.pack.raster import Raster
from msvae.pack.sheet import SHEET_NAME, save_contact_sheet
from msvae.pack.sources import ImageSource, find_sources
from msvae.pack.split import resolve_split_by, split_tiles
from msvae.pack.tiling import Survey, Tile, num_grid_tiles
from msvae.shards.manifest import Manifest, ShardEntry, Shards
from msvae.shards.reader import ShardReader
from msvae.shards.statistics import LeafMoments
from msvae.shards.tar import ShardWriter
from msvae.shards.tile_codec import Compression

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Image:
    """An image that fits the data set: which of its bands are taken and how its leaf mask is found."""

    source: ImageSource
    positions: tuple[int, ...]
    mask: MaskRule
    height: int
    width: int


@dataclass(frozen=True)
class DataSet:
    """All images and what they have in common."""

    images: tuple[Image, ...]
    layout: Layout
    options: PackOptions

    def open(self, index: int) -> MaskedImage:
        """One image with its leaf mask."""
        image = self.images[index]
        return MaskedImage(image.source, image.positions, image.mask, self.layout, self.options)


class Progress:
    """Counts tiles of both passes. Until the survey ends, every tile is taken for one that will be written."""

    def __init__(self, num_tiles: int, on_progress: OnProgress | None) -> None:
        self._done, self._total, self._report = 0, 2 * num_tiles, on_progress

    def tile(self) -> None:
        """One tile was surveyed or written."""
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total)

    def survey_ended(self, num_kept: int) -> None:
        """Now it is known how many tiles will be written."""
        self._total = self._done + num_kept


def pack(
    images: Sequence[Path], out: Path, options: PackOptions, on_progress: OnProgress | None = None
) -> PackSummary:
    """Cut images into tiles with leaf masks and write `out/{train,val,test}`.

    `images` are rasters, folders of rasters, or with `options.band_files` folders of band files. `out` appears
    complete or not at all; the same input gives the same bytes. `on_progress` gets tiles done and in all.

    Raises: ValueError, one line, for anything that is wrong with images, masks, options or output.
    """
    out = out.resolve()
    expression = parse_mask_option(options.mask)
    sources = find_sources(images, options.band_files, options.mask_files)
    check_output(out, [file for source in sources for file in source.files], options.overwrite)
    with (
        gdal_session(),
        replacing_folder(out) as partial,
        TemporaryDirectory(prefix=f".{out.name}.masks-", dir=out.parent) as masks,
    ):
        data_set = prepare_masks(describe_images(sources, options, expression), Path(masks))
        sizes = [num_grid_tiles(image.height, image.width, options.tile_px) for image in data_set.images]
        progress = Progress(sum(sizes), on_progress)
        survey = survey_images(data_set, progress)
        progress.survey_ended(len(survey.tiles))
        split_by = resolve_split_by(options.split_by, survey.tiles)
        block_px = options.block_tiles * options.tile_px
        splits = split_tiles(survey.tiles, split_by, options.split, block_px, options.seed)
        manifests = write_splits(data_set, splits, partial, progress)
        save_contact_sheet(partial / SHEET_NAME, {name: ShardReader(partial / name) for name in manifests})
        num_bytes = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    return summarise(data_set, survey, splits, manifests, out, split_by, num_bytes)


def describe_images(sources: Sequence[ImageSource], options: PackOptions, expression: Expression | None) -> DataSet:
    """Open every image once and see that they fit together, before a pixel is read."""
    layout, images = None, []
    for source in sources:
        with Raster(source, options) as raster:
            info = raster.info
        if layout is None:
            layout, positions = first_layout(source.path, info, options)
            if expression is not None:
                expression.band_indices(layout.bands)
        else:
            positions = fit_layout(source.path, info, layout, options)
        rule = choose_mask(source, info, expression, options.mask_files)
        images.append(Image(source, tuple(positions), rule, info.height, info.width))
    assert layout is not None
    return DataSet(tuple(images), layout, options)


def prepare_masks(data_set: DataSet, folder: Path) -> DataSet:
    """What must be known of whole images before the first tile: thresholds, and masks that are cleaned as a whole."""
    images = []
    for number, image in enumerate(data_set.images):

        def open_image(rule: MaskRule, image: Image = image) -> MaskedImage:
            return MaskedImage(image.source, image.positions, rule, data_set.layout, data_set.options)

        rule = prepare_rule(image.mask, open_image, data_set.options, folder / str(number))
        images.append(replace(image, mask=rule))
    return replace(data_set, images=tuple(images))


def survey_images(data_set: DataSet, progress: Progress) -> Survey:
    """First pass: coverage of every tile.

    Raises: ValueError when no tile holds enough leaf, or nothing told leaf from background in an image.
    """
    options = data_set.options
    survey = Survey(options.tile_px, options.min_coverage)
    for index, image in enumerate(data_set.images):
        if num_grid_tiles(image.height, image.width, options.tile_px) == 0:
            survey.drop_small_image()
            continue
        with data_set.open(index) as opened:
            background_seen = survey.add_image(index, opened, progress.tile)
            opened.check_reflectance()
        if image.mask.must_see_background and not background_seen:
            raise no_mask_error(image.source)
    if not survey.tiles:
        reasons = ", ".join(f"{count} {reason}" for reason, count in survey.dropped.items())
        raise ValueError(
            f"no tile left to train on: {len(data_set.images)} images, dropped {reasons}; "
            "lower --min-coverage or --tile, or choose another --mask"
        )
    return survey


def write_splits(
    data_set: DataSet, splits: dict[str, list[Tile]], folder: Path, progress: Progress
) -> dict[str, Manifest]:
    """Second pass: the shards of every split that has tiles, and their manifests."""
    layout = data_set.layout
    moments = LeafMoments(len(layout.bands))
    shards: dict[str, list[ShardEntry]] = {}
    for name, tiles in splits.items():
        if tiles:
            (folder / name).mkdir()
            gather = moments if name == SPLITS[0] else None
            shards[name] = _write_shards(data_set, tiles, folder / name, gather, progress)
    manifests = {
        name: Manifest(
            band_names=list(layout.bands.names),
            wavelengths_nm=list(layout.bands.wavelengths_nm),
            dtype=layout.dtype,
            tile_px=data_set.options.tile_px,
            scale=list(layout.scale),
            offset=list(layout.offset),
            compression=compression(data_set.options),
            statistics=moments.result(),
            shards=Shards.of(entries),
        )
        for name, entries in shards.items()
    }
    for name, manifest in manifests.items():
        manifest.save(folder / name)
    return manifests


def _write_shards(
    data_set: DataSet, tiles: Sequence[Tile], folder: Path, moments: LeafMoments | None, progress: Progress
) -> list[ShardEntry]:
    entries = []
    per_shard = data_set.options.tiles_per_shard
    with closing(_samples(data_set, tiles)) as samples:
        for number in range(-(-len(tiles) // per_shard)):
            with ShardWriter(folder / f"leaf-{number:06d}.tar", compression(data_set.options)) as writer:
                for key, stored_CHW, leaf_HW, about in islice(samples, per_shard):
                    writer.write(key, stored_CHW, leaf_HW, about)
                    if moments is not None:
                        moments.add(data_set.layout.reflectance(stored_CHW[:, leaf_HW]))
                    progress.tile()
            assert writer.entry is not None
            entries.append(writer.entry)
    return entries


def _samples(
    data_set: DataSet, tiles: Sequence[Tile]
) -> Generator[tuple[str, NDArray[Any], NDArray[np.bool_], dict[str, Any]], None, None]:
    """Key, stored tile (C, H, W), leaf mask (H, W) and what is known about them, read again from the images."""
    size_px = data_set.options.tile_px
    for index, group in groupby(tiles, key=lambda tile: tile.image):
        source = data_set.images[index].source
        with data_set.open(index) as opened:
            for tile in group:
                stored_CHW, leaf_HW = opened.read(tile.row, tile.col, size_px)
                about = {
                    "source": source.file_names,
                    "window": [tile.row, tile.col, size_px, size_px],
                    "coverage": tile.leaf_pixels / size_px**2,
                    **opened.raster.place(tile.row, tile.col),
                }
                yield f"{source.name}_r{tile.row:05d}_c{tile.col:05d}", stored_CHW, leaf_HW, about


def compression(options: PackOptions) -> Compression:
    """How tiles are stored."""
    return "blosc2" if options.compress else "none"


def summarise(
    data_set: DataSet,
    survey: Survey,
    splits: dict[str, list[Tile]],
    manifests: dict[str, Manifest],
    out: Path,
    split_by: str,
    num_bytes: int,
) -> PackSummary:
    """What was packed, and every assumption that was made on the way."""
    layout, options = data_set.layout, data_set.options
    leaf_pixels = {name: sum(tile.leaf_pixels for tile in splits[name]) for name in manifests}
    return PackSummary(
        out=out,
        num_images=len(data_set.images),
        bands=layout.bands,
        dtype=layout.dtype,
        scale=layout.scale,
        offset=layout.offset,
        tile_px=options.tile_px,
        split_by=split_by,
        tiles={name: manifest.num_samples for name, manifest in manifests.items()},
        leaf_pixels=leaf_pixels,
        num_shards={name: len(manifest.shards) for name, manifest in manifests.items()},
        coverage_mean=sum(leaf_pixels.values()) / (len(survey.tiles) * options.tile_px**2),
        dropped=dict(survey.dropped),
        num_bytes=num_bytes,
        notices=tuple(_notices(data_set, splits, manifests[SPLITS[0]], split_by)),
    )


def _notices(data_set: DataSet, splits: dict[str, list[Tile]], train: Manifest, split_by: str) -> Iterator[str]:
    yield from data_set.layout.notices
    rules = [image.mask for image in data_set.images]
    if (thresholds := threshold_notice(rules)) is not None:
        yield thresholds
    by_validity = sum(1 for rule in rules if rule.file is None and rule.expression is None)
    if by_validity:
        yield (
            f"leaf mask of {by_validity} of {len(data_set.images)} images taken from nodata or NaN: "
            "everything else in them counts as leaf"
        )
    if (brightest := max(train.statistics.mean)) > 1:
        yield (
            f"mean leaf reflectance is {brightest:g}, expected 0 to 1; give --scale, such as 0.0001 for "
            "reflectance x 10000"
        )
    for name, share in zip(SPLITS, data_set.options.split, strict=True):
        if share > 0 and not splits[name]:
            yield (
                f"no {name} split: too few {split_by}s with leaf for a share of {share:g}; "
                "pack more images, or give --split-by block or a smaller --tile"
            )
