"""Pack rasters and leaf masks into the shards of a dataset.

Packing prepares masks that depend on whole images, counts leaf pixels, chooses tiles, assigns them to splits, and
writes shards and manifests. Every step keeps its results in the work folder, so that any process can resume.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from msvae.files import move_folder
from msvae.messages import OnProgress, counted
from msvae.packing.options import PackOptions
from msvae.packing.shards import STATISTICS, ShardPlan, plan_shards, write_manifests, write_shard
from msvae.packing.splits import SplitTiles, group_names, split_tiles
from msvae.packing.summary import PackSummary, summarise
from msvae.packing.survey import (
    MASKS,
    SURVEY,
    Survey,
    count_strip,
    find_tiles,
    load_survey,
    num_tiles_in,
    prepare_image,
    strips_of,
)
from msvae.packing.workers import PackJob, start_workers
from msvae.rasters.gdal import gdal_session
from msvae.rasters.images import ImageSet, describe_images
from msvae.rasters.masks import parse_mask_option
from msvae.rasters.sources import find_sources, unused_files
from msvae.rasters.whole_image import num_passes, with_prepared_masks
from msvae.report.contact_sheet import contact_sheet
from msvae.shards.audit.leaks import check_leaks
from msvae.shards.manifest import MANIFEST_NAME, Manifest
from msvae.shards.reader import ShardReader
from msvae.shards.splits import SPLITS, reflectance_tiles
from msvae.shards.stores import open_store
from msvae.work_folder import work_folder

PACKED = re.compile(r"leaf-\d{6,}\.(tar|index\.json)")
SHEET_NAME = "contact-sheet.png"
TILES_PER_SPLIT = 18
"""Tiles of each split in the contact sheet."""

TaskT = TypeVar("TaskT")
MIN_PIXELS_PER_PROCESS = 2**24
"""Packing fewer pixels takes less time than starting a process."""
OPTIONS_OF_A_RUN = {"overwrite", "num_workers", "part", "merge"}
"""Options that change how the work is done, but not the dataset."""


class Progress:
    """Counts the tiles of all passes. Until the survey ends, all tiles are expected to be written."""

    def __init__(self, num_tiles: int, num_passes: int, on_progress: OnProgress | None) -> None:
        self._done, self._total, self._on_progress = 0, num_passes * num_tiles, on_progress

    def count(self, num_tiles: int) -> None:
        """Add tiles that were masked, surveyed or written."""
        self._done += num_tiles
        if self._on_progress is not None and num_tiles:
            self._on_progress(self._done, self._total)

    def survey_ended(self, num_kept: int) -> None:
        """Correct the total: only `num_kept` tiles will be written."""
        self._total = self._done + num_kept


def pack(
    images: Sequence[Path], out: Path, options: PackOptions, on_progress: OnProgress | None = None
) -> PackSummary:
    """Cut images into tiles with leaf masks and write `out/{train,val,test}`.

    `out` appears complete or not at all. The same input gives the same bytes, for any number of processes and parts.
    The same call resumes a killed run.

    Args:
        images: rasters, folders of rasters, or with `options.band_files` folders of band files.
        on_progress: called with the number of tiles that are done and of all tiles.

    Raises: ValueError, in one line, if images, masks, options or output are invalid.
    """
    out = out.resolve()
    expression = parse_mask_option(options.mask)
    sources = find_sources(images, options.band_files, options.mask_files)
    if options.group_by is not None:
        group_names(sources, options.group_by)  # an image without a group is reported before any work
    check_output(out, [file for source in sources for file in source.files], options.overwrite)
    with gdal_session(), work_folder(out, shared=options.part is not None) as work:
        image_set = describe_images(sources, options, expression)
        if options.merge and not work.record.is_file():
            raise ValueError(f"got --merge but no part was made for {out}; run the parts first, with --part i/n")
        work.begin(_record(image_set, options), [MASKS, SURVEY, STATISTICS])
        job, num_workers = PackJob(image_set, options, work), _num_workers(image_set, options)
        strips = [strips_of(job, index) for index in range(len(image_set.images))]
        num_tiles = sum(num_tiles_in(job, strip) for strip in chain(*strips))
        progress = Progress(num_tiles, 3 if num_passes(image_set) else 2, on_progress)
        if num_passes(image_set):
            with start_workers(job, num_workers, progress.count) as workers:
                workers.run(prepare_image, _own_first(range(len(image_set.images)), options.part))
            job = dataclasses.replace(job, image_set=with_prepared_masks(image_set, work.path / MASKS))
        with start_workers(job, num_workers, progress.count) as workers:
            large = [strip for of_image in strips if len(of_image) > 1 for strip in of_image]
            workers.run(count_strip, _own_first(large, options.part))
            workers.run(find_tiles, _own_first(range(len(image_set.images)), options.part))
            survey = load_survey(job)
            splits = split_tiles(survey.tiles, sources, options)
            plans = plan_shards(splits, options.tiles_per_shard)
            own_plans = _own_plans(job, plans)
            progress.survey_ended(sum(len(plan.tiles) for plan in own_plans))
            for split in {plan.split for plan in own_plans}:
                (work.data / split).mkdir(exist_ok=True)
            workers.run(write_shard, own_plans)
        if options.part is not None:
            return summarise(job, survey, splits, plans, sum(not plan.is_done(work) for plan in plans))
        summary = _complete(job, survey, splits, plans)
        move_folder(work.data, out)
        shutil.rmtree(work.path)
    notices = (*summary.notices, *unused_files(images, sources, options.mask_files))
    return dataclasses.replace(summary, out=out, notices=notices)


def check_output(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Check that the dataset can be put in place of `out` and that this destroys nothing else.

    Raises: ValueError if `out` is a file or a mount point, holds data without `overwrite`, holds anything other than a
    packed dataset, or holds one of the inputs.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.is_mount():
        raise ValueError(f"--out {out} is a mount point and cannot be replaced in one step; name a folder inside it")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not names:
        return
    if not overwrite:
        raise ValueError(f"--out {out} exists and is not empty; name another folder or give --overwrite")
    foreign = [name for name in names if name not in (*SPLITS, SHEET_NAME)] + [
        f"{split}/{path.name}"
        for split in SPLITS
        for path in sorted((out / split).glob("*"))
        if path.name != MANIFEST_NAME and not PACKED.fullmatch(path.name)
    ]
    if foreign or any(path.is_relative_to(out) for path in inputs):
        raise ValueError(
            f"--overwrite would delete {', '.join(foreign[:5]) or 'the images'} in {out}, which is not a packed "
            "dataset; name another --out"
        )


def is_merged(out: Path, options: PackOptions) -> bool:
    """Return True if `out` holds a dataset that these options may have made, according to its manifest."""
    try:
        manifest = Manifest.load(out / SPLITS[0])
    except ValueError:
        return False
    return (manifest.tile_px, manifest.compression) == (options.tile_px, options.compression)


def save_contact_sheet(path: Path, readers: Mapping[str, ShardReader]) -> None:
    """Draw 18 evenly spaced tiles of each split, under the name of the split.

    Raises: ValueError if a tile cannot be read or the file cannot be written.
    """
    sections = [
        (f"{name}: {counted(sum(reader.samples_per_shard), 'tile')}", reflectance_tiles(reader, TILES_PER_SPLIT))
        for name, reader in readers.items()
    ]
    bands = next(iter(readers.values())).manifest.bands
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contact_sheet(sections, bands))
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); choose a writable folder") from error


def _record(image_set: ImageSet, options: PackOptions) -> dict[str, Any]:
    """Return everything that determines the bytes of the dataset."""
    stats = {str(file): file.stat() for file in image_set.input_files()}
    return {
        "options": options.model_dump(exclude=OPTIONS_OF_A_RUN),
        "inputs": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
    }


def _num_workers(image_set: ImageSet, options: PackOptions) -> int:
    """Return the number of processes, by default one per core."""
    if options.num_workers is not None:
        return options.num_workers
    num_pixels = sum(image.height * image.width for image in image_set.images)
    return min(len(os.sched_getaffinity(0)), 1 + num_pixels // MIN_PIXELS_PER_PROCESS)


def _own_first(tasks: Sequence[TaskT], part: tuple[int, int] | None) -> list[TaskT]:
    """Order tasks so that each part begins with its own share. The other parts have then made most other shares."""
    number, num_parts = part or (1, 1)
    return [task for share in range(num_parts) for task in tasks[(number - 1 + share) % num_parts :: num_parts]]


def _own_plans(job: PackJob, plans: Sequence[ShardPlan]) -> Sequence[ShardPlan]:
    """Return the shards that this run writes.

    Raises: ValueError if parts are to be merged and shards are missing.
    """
    if job.options.part is not None:
        number, num_parts = job.options.part
        return plans[number - 1 :: num_parts]
    missing = [plan for plan in plans if not plan.is_done(job.work)]
    if job.options.merge and missing:
        raise ValueError(
            f"got --merge but {len(missing)} of {len(plans)} shards are not made, such as {missing[0].split}/"
            f"{missing[0].name}; run the unfinished parts again, or this command without --merge"
        )
    return plans


def _complete(job: PackJob, survey: Survey, splits: SplitTiles, plans: Sequence[ShardPlan]) -> PackSummary:
    """Write manifests and contact sheet, check for leaks between splits, and remove leftover files.

    Raises: ValueError if splits share tiles.
    """
    work = job.work
    manifests = write_manifests(job, plans)
    save_contact_sheet(work.data / SHEET_NAME, {name: ShardReader(work.data / name) for name in manifests})
    duplicates = check_leaks({name: open_store(work.data / name) for name in manifests})
    for leftover in work.data.glob("*/.*"):  # left behind by processes that were killed
        leftover.unlink()
    return summarise(job, survey, splits, plans, 0, manifests[SPLITS[0]], duplicates)
