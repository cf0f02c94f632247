"""Shards of tiles into shards of latents, on any number of ranks to the same bytes, and the factors for diffusion.

Whatever is complete lies in `.OUT.partial`, as when packing, and a killed run goes on from there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from msvae.distributed.collectives import Ranks
from msvae.files import move_folder, write_text
from msvae.inference.encoder import EncodeOptions, Encoder
from msvae.inference.latent_statistics import factors, statistics
from msvae.inference.load import load_model
from msvae.messages import OnProgress
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.packing.work import WorkFolder, work_folder
from msvae.shards import mask_png
from msvae.shards.latents import MEMBER, LatentManifest
from msvae.shards.loader import Loader
from msvae.shards.manifest import MANIFEST_NAME, Shards, index_name
from msvae.shards.order import MicroBatchPlan, SampleRef
from msvae.shards.reader import ShardReader
from msvae.shards.splits import SPLITS, splits_to_make
from msvae.shards.stores.opening import open_store
from msvae.shards.tar import ShardWriter, shard_entry

MODEL_FOLDER = "model"


class ShardJob(NamedTuple):
    """One shard of tiles that becomes one of latents."""

    split: str
    shard: int
    name: str
    num_samples: int

    def tar(self, work: WorkFolder) -> Path:
        """Where it is made."""
        return work.data / self.split / self.name

    def sums(self, work: WorkFolder) -> Path:
        """What its leaf cells sum up to; there before the shard is."""
        return work.path / "statistics" / f"{self.split}-{self.name}.json"

    def is_done(self, work: WorkFolder) -> bool:
        """Whether shard and index are in place; the index comes last."""
        tar = self.tar(work)
        return tar.is_file() and (tar.parent / index_name(tar.name)).is_file()


def encode(
    model_name: str,
    shards: str,
    out: Path,
    options: EncodeOptions,
    ranks: Ranks,
    on_progress: OnProgress | None = None,
) -> dict[str, LatentManifest]:
    """Write `out/{train,val,test}` of latents, and `out/model` with the factors in its config; called by all ranks.

    Args: folder or hub id of a model; a data set or one split of it, folder or URL; a folder that all ranks see.
        `on_progress` gets this rank's tiles done and in all.
    Returns: the manifest of each split; where the same latents are there already, nothing else is done.
    Raises: ValueError, one line, for anything that is wrong with model, shards, options or output.
    """
    out = out.resolve()
    readers = {name: ShardReader(store.location) for name, store in splits_to_make(shards).items()}
    model = load_model(model_name, ranks.device)
    encoder = Encoder(model, options)
    for reader in readers.values():
        _check_bands(reader, model, model_name)
    identity = _identity(encoder, readers)
    if ranks.broadcast_object(lambda: _is_there(out, identity)):
        return _manifests(out, readers)
    jobs = [
        ShardJob(split, shard, entry.name, entry.num_samples)
        for split, reader in readers.items()
        for shard, entry in enumerate(reader.manifest.shards)
    ]
    with ExitStack() as held:
        ranks.broadcast_object(lambda: _begin(out, identity, readers, held))
        work = WorkFolder(out.with_name(f".{out.name}.partial"))
        done = ranks.broadcast_object(lambda: [job.is_done(work) for job in jobs])
        missing = [job for job, is_done in zip(jobs, done, strict=True) if not is_done]
        _encode_shards(encoder, readers, missing[ranks.rank :: ranks.world_size], work, on_progress)
        sums = _join_sums(jobs, missing, _statistics_split(readers), model.config.latent_channels, work, ranks)
        ranks.broadcast_object(lambda: _finish(out, encoder, identity, readers, jobs, sums, work))
    return _manifests(out, readers)


def _check_bands(reader: ShardReader, model: AutoencoderKLMultispectralAdapter, name: str) -> None:
    bands = reader.manifest.bands
    if bands.wavelengths_nm != model.bands.wavelengths_nm:
        raise ValueError(
            f"{reader.store.location} holds {bands}, {name} expects {model.bands}; repack with --wavelengths, or use "
            "the model trained on these bands"
        )


def _identity(encoder: Encoder, readers: dict[str, ShardReader]) -> dict[str, Any]:
    """What decides the bytes of the latents, under the names that messages give it."""
    options = asdict(encoder.options)
    if encoder.options.kind == "moments":
        options["seed"] = None
    tiles = {split: reader.manifest.digest() for split, reader in readers.items()}
    return {"model": encoder.sha256, **options, "tiles": tiles}


def _is_there(out: Path, identity: dict[str, Any]) -> bool:
    """Whether these very latents are there, complete. Raises: ValueError when something else is."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    differing = []
    for split, tiles in identity["tiles"].items():
        if not (out / split / MANIFEST_NAME).is_file():
            raise ValueError(f"{out} exists and holds no latents of {split}; name another OUT")
        found = LatentManifest.load(open_store(out / split))
        known = {"model": found.model_sha256, "kind": found.kind, "dtype": found.dtype, "seed": found.seed}
        differing += [name for name, value in known.items() if value != identity[name]]
        differing += ["tiles"] if found.tiles_sha256 != tiles else []
    if differing:
        what = ", ".join(dict.fromkeys(differing))
        raise ValueError(f"{out} holds latents of another {what}; name another OUT, or delete it to encode anew")
    return True


def _begin(out: Path, identity: dict[str, Any], readers: dict[str, ShardReader], held: ExitStack) -> None:
    work = held.enter_context(work_folder(out, shared=False))
    options = {name: value for name, value in identity.items() if name != "tiles"}
    inputs = {reader.store.location: identity["tiles"][split] for split, reader in readers.items()}
    work.begin({"options": options, "inputs": inputs})
    for split in readers:
        (work.data / split).mkdir(exist_ok=True)


def _encode_shards(
    encoder: Encoder,
    readers: dict[str, ShardReader],
    jobs: Sequence[ShardJob],
    work: WorkFolder,
    on_progress: OnProgress | None,
) -> None:
    done, total = 0, sum(job.num_samples for job in jobs)
    for split, of_split in groupby(jobs, key=lambda job: job.split):
        reader, by_shard = readers[split], {job.shard: job for job in of_split}
        plans = (plan for job in by_shard.values() for plan in _plans(job, encoder.options.batch_size))
        loader = Loader(
            reader, plans, batch_size=encoder.options.batch_size, num_workers=2, device=encoder.model.device
        )
        for shard, batches in groupby(loader, key=lambda batch: batch.plan.samples[0].shard):
            sums = []
            with ShardWriter(by_shard[shard].tar(work)) as writer:
                for batch in batches:
                    rows = (sample.row for sample in batch.plan.samples)
                    for row, (key, latents, leaf_HW, of_tile) in zip(rows, encoder(batch), strict=True):
                        writer.append(key, (MEMBER, latents), mask_png.encode(leaf_HW), reader.about(shard, row))
                        sums.append(of_tile)
                    done += len(batch.keys)
                    if on_progress is not None:
                        on_progress(done, total)
                write_text(by_shard[shard].sums(work), json.dumps(np.sum(sums, axis=0).tolist()))


def _plans(job: ShardJob, batch_size: int) -> Iterator[MicroBatchPlan]:
    for position, first in enumerate(range(0, job.num_samples, batch_size)):
        rows = range(first, min(first + batch_size, job.num_samples))
        yield MicroBatchPlan(position, tuple(SampleRef(job.shard, row, slot) for slot, row in enumerate(rows)))


def _statistics_split(readers: dict[str, ShardReader]) -> str:
    return SPLITS[0] if SPLITS[0] in readers else next(iter(readers))


def _join_sums(
    jobs: Sequence[ShardJob],
    missing: Sequence[ShardJob],
    split: str,
    num_channels: int,
    work: WorkFolder,
    ranks: Ranks,
) -> NDArray[np.float64]:
    """Sums over the leaf cells of a split. A shard's come from the rank that made it, else from rank 0."""
    made_by = {job: number % ranks.world_size for number, job in enumerate(missing)}
    chosen = [job for job in jobs if job.split == split]
    rows = torch.zeros((len(chosen), 1 + 2 * num_channels), dtype=torch.float64)
    for row, job in zip(rows, chosen, strict=True):
        if made_by.get(job, 0) == ranks.rank:
            row.copy_(torch.tensor(json.loads(job.sums(work).read_text()), dtype=torch.float64))
    # on every other rank a row is 0, so that adding changes no bit; shards are then added in their order
    joined: NDArray[np.float64] = ranks.all_reduce_sums({"rows": rows})["rows"].cpu().numpy()
    return np.add.accumulate(joined)[-1]  # type: ignore[no-any-return]


def _finish(
    out: Path,
    encoder: Encoder,
    identity: dict[str, Any],
    readers: dict[str, ShardReader],
    jobs: Sequence[ShardJob],
    sums: NDArray[np.float64],
    work: WorkFolder,
) -> None:
    of_leaf = statistics(sums)
    shift_factor, scaling_factor = factors(of_leaf)
    model, options = encoder.model, encoder.options
    for split, reader in readers.items():
        tiles = reader.manifest
        manifest = LatentManifest(
            kind=options.kind,
            seed=identity["seed"],
            dtype=options.dtype,
            latent_channels=model.config.latent_channels,
            cells=tiles.tile_px // model.downscale,
            tile_px=tiles.tile_px,
            band_names=tiles.band_names,
            wavelengths_nm=tiles.wavelengths_nm,
            model_sha256=encoder.sha256,
            tiles_sha256=identity["tiles"][split],
            shift_factor=shift_factor,
            scaling_factor=scaling_factor,
            statistics=of_leaf,
            shards=Shards.of(shard_entry(job.tar(work)) for job in jobs if job.split == split),
        )
        write_text(work.data / split / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")
    model.register_to_config(shift_factor=shift_factor, scaling_factor=scaling_factor, factors_of_leaves=True)
    model.save_pretrained(work.data / MODEL_FOLDER)
    for leftover in work.data.glob("*/.*"):  # of processes that were killed
        leftover.unlink()
    move_folder(work.data, out)
    shutil.rmtree(work.path)


def _manifests(out: Path, splits: dict[str, ShardReader]) -> dict[str, LatentManifest]:
    return {split: LatentManifest.load(open_store(out / split)) for split in splits}
