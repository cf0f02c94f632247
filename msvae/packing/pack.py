"""Packing: rasters and leaf masks become the shards of a data set.

What only whole images tell of their masks is found, the survey counts leaf and chooses tiles, the splits are dealt,
the shards written, and the whole is put in place.
Every step keeps what it has made in the work folder, so that any process can go on from there.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from msvae.files import move_folder
from msvae.messages import OnProgress
from msvae.packing.options import SPLITS, PackOptions, PackSummary
from msvae.packing.output import check_output
from msvae.packing.shards import ShardJob, plan_shards, write_shard
from msvae.packing.sheet import SHEET_NAME, save_contact_sheet
from msvae.packing.splits import SplitTiles, group_names, split_tiles
from msvae.packing.summary import summarise
from msvae.packing.survey import Survey, bands_of, count_band, find_tiles, load_survey, num_tiles_of
from msvae.packing.workers import workers
from msvae.rasters.gdal import gdal_session
from msvae.rasters.images import DataSet, describe_images
from msvae.rasters.masks import parse_mask_option
from msvae.rasters.sources import find_sources, passed_over
from msvae.rasters.whole_image import needs_preparing, prepare_mask, prepared
from msvae.shards.audit.leaks import check_leaks
from msvae.shards.leaf_accumulators import COVERAGE_BINS, LeafValues, coverage_bin
from msvae.shards.manifest import Manifest, Shards
from msvae.shards.reader import ShardReader
from msvae.shards.stores import open_store
from msvae.shards.writer import shard_entry
from msvae.work_folder import WorkFolder, work_folder

TaskT = TypeVar("TaskT")
PIXELS_WORTH_A_PROCESS = 2**24
"""Fewer are packed sooner than a process has started."""
OPTIONS_OF_A_RUN = ("overwrite", "num_workers", "part", "merge")
"""They decide how the work is done and not what is made."""


class Progress:
    """Counts tiles of all passes. Until the survey ends, every tile is taken for one that will be written."""

    def __init__(self, num_tiles: int, passes: int, on_progress: OnProgress | None) -> None:
        self._done, self._total, self._report = 0, passes * num_tiles, on_progress

    def count(self, num_tiles: int) -> None:
        """Tiles were masked, surveyed or written."""
        self._done += num_tiles
        if self._report is not None and num_tiles:
            self._report(self._done, self._total)

    def survey_ended(self, num_kept: int) -> None:
        """Now it is known how many tiles will be written."""
        self._total = self._done + num_kept


def pack(
    images: Sequence[Path], out: Path, options: PackOptions, on_progress: OnProgress | None = None
) -> PackSummary:
    """Cut images into tiles with leaf masks and write `out/{train,val,test}`.

    `images` are rasters, folders of rasters, or with `options.band_files` folders of band files. `out` appears
    complete or not at all; the same input gives the same bytes, whatever the number of processes and parts. A run that
    was killed is gone on with by the same call. `on_progress` gets tiles done and in all.

    Raises: ValueError, one line, for anything that is wrong with images, masks, options or output.
    """
    out = out.resolve()
    expression = parse_mask_option(options.mask)
    sources = find_sources(images, options.band_files, options.mask_files)
    if options.group_by is not None:
        group_names(sources, options.group_by)
    check_output(out, [file for source in sources for file in source.files], options.overwrite)
    with gdal_session(), work_folder(out, shared=options.part is not None) as work:
        data_set = describe_images(sources, options, expression)
        if options.merge and not work.record.is_file():
            raise ValueError(f"got --merge but no part was made for {out}; run the parts first, with --part i/n")
        work.begin(_record(data_set))
        bands = [bands_of(data_set, index) for index in range(len(data_set.images))]
        num_tiles = sum(num_tiles_of(data_set, band) for band in chain(*bands))
        progress = Progress(num_tiles, 2 + needs_preparing(data_set), on_progress)
        data_set = _prepare(data_set, work, progress)
        with workers(data_set, work, _num_workers(data_set), progress.count) as crew:
            large = [band for of_image in bands if len(of_image) > 1 for band in of_image]
            crew.run(count_band, _own_first(large, options.part))
            crew.run(find_tiles, _own_first(range(len(data_set.images)), options.part))
            survey = load_survey(data_set, work)
            splits = split_tiles(survey.tiles, sources, options)
            jobs = plan_shards(splits, options.tiles_per_shard)
            own = _own_shards(jobs, work, options)
            progress.survey_ended(sum(len(job.tiles) for job in own))
            for split in {job.split for job in own}:
                (work.data / split).mkdir(exist_ok=True)
            crew.run(write_shard, own)
        missing = [job for job in jobs if not job.is_done(work)]
        if options.part is not None:
            return summarise(data_set, survey, splits, jobs, work.data, len(missing))
        summary = _complete(data_set, survey, splits, jobs, work)
        move_folder(work.data, out)
        shutil.rmtree(work.path)
    notices = (*summary.notices, *passed_over(images, sources, options.mask_files))
    return dataclasses.replace(summary, out=out, notices=notices)


def _prepare(data_set: DataSet, work: WorkFolder, progress: Progress) -> DataSet:
    """With what only whole images tell of their masks."""
    if not needs_preparing(data_set):
        return data_set
    with workers(data_set, work, _num_workers(data_set), progress.count) as crew:
        crew.run(prepare_mask, _own_first(range(len(data_set.images)), data_set.options.part))
    return prepared(data_set, work.masks)


def _complete(
    data_set: DataSet, survey: Survey, splits: SplitTiles, jobs: Sequence[ShardJob], work: WorkFolder
) -> PackSummary:
    """Add what is made of all shards."""
    manifests = write_manifests(data_set, jobs, work)
    save_contact_sheet(work.data / SHEET_NAME, {name: ShardReader(work.data / name) for name in manifests})
    duplicates = check_leaks({name: open_store(work.data / name) for name in manifests})
    for leftover in work.data.glob("*/.*"):  # of processes that were killed
        leftover.unlink()
    return summarise(data_set, survey, splits, jobs, work.data, 0, manifests[SPLITS[0]], duplicates)


def _record(data_set: DataSet) -> dict[str, Any]:
    """All that decides the bytes of the data set."""
    options = dataclasses.asdict(data_set.options)
    stats = {str(file): file.stat() for file in data_set.input_files()}
    return {
        "options": {name: value for name, value in options.items() if name not in OPTIONS_OF_A_RUN},
        "inputs": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
    }


def _num_workers(data_set: DataSet) -> int:
    """Processes to start, by default one a core."""
    if data_set.options.num_workers is not None:
        return data_set.options.num_workers
    num_pixels = sum(image.height * image.width for image in data_set.images)
    return min(len(os.sched_getaffinity(0)), 1 + num_pixels // PIXELS_WORTH_A_PROCESS)


def _own_first(tasks: Sequence[TaskT], part: tuple[int, int] | None) -> list[TaskT]:
    """The survey is needed by every part: each begins with its share of it, and finds most of the rest done."""
    number, num_parts = part or (1, 1)
    return [task for share in range(num_parts) for task in tasks[(number - 1 + share) % num_parts :: num_parts]]


def _own_shards(jobs: Sequence[ShardJob], work: WorkFolder, options: PackOptions) -> Sequence[ShardJob]:
    """The shards that this run makes."""
    if options.part is not None:
        number, num_parts = options.part
        return jobs[number - 1 :: num_parts]
    missing = [job for job in jobs if not job.is_done(work)]
    if options.merge and missing:
        raise ValueError(
            f"got --merge but {len(missing)} of {len(jobs)} shards are not made, such as {missing[0].split}/"
            f"{missing[0].name}; run the parts that have not ended again, or this command without --merge"
        )
    return jobs


def write_manifests(data_set: DataSet, jobs: Sequence[ShardJob], work: WorkFolder) -> dict[str, Manifest]:
    """The manifest of every split that has shards, from the shards as they lie there."""
    layout, tile_px = data_set.layout, data_set.options.tile_px
    values = LeafValues(layout.dtype, layout.scale, layout.offset)
    training = [job for job in jobs if job.split == SPLITS[0]]
    for job in training:
        values.join_saved(work.statistics(job.name))
    bins = [coverage_bin(tile.leaf_pixels, tile_px**2) for job in training for tile in job.tiles]
    statistics = values.result(np.bincount(bins, minlength=COVERAGE_BINS).tolist())
    manifests = {}
    for split in dict.fromkeys(job.split for job in jobs):
        manifests[split] = Manifest(
            band_names=list(layout.bands.names),
            wavelengths_nm=list(layout.bands.wavelengths_nm),
            dtype=layout.dtype,
            tile_px=tile_px,
            scale=list(layout.scale),
            offset=list(layout.offset),
            compression=data_set.options.compression,
            statistics=statistics,
            shards=Shards.of(shard_entry(job.tar(work)) for job in jobs if job.split == split),
        )
        manifests[split].save(work.data / split)
    return manifests
