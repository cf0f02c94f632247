"""Encode shards of tiles into shards of latents, with the same bytes on any number of ranks.

Finished shards are kept in `.OUT.partial`, as by `msvae pack`, so that a killed run continues. `OUT/model` is a copy
of the model with the factors that a diffusion model needs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from msvae.distributed.collectives import Ranks
from msvae.files import move_folder, write_text
from msvae.inference.encoder import EncodeOptions, Encoder, diffusion_factors, leaf_latent_statistics
from msvae.inference.load import load_model
from msvae.messages import OnProgress
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.shards.latents import LATENTS_ENDING, LatentManifest
from msvae.shards.loader import Loader
from msvae.shards.manifest import MANIFEST_NAME, Shards
from msvae.shards.order import SampleRef, in_micro_batches
from msvae.shards.reader import ShardReader
from msvae.shards.sample_codec import encode_mask
from msvae.shards.splits import SPLITS, splits_to_make
from msvae.shards.stores import open_store
from msvae.shards.writer import ShardWriter, is_complete, shard_entry
from msvae.work_folder import WorkFolder, work_folder

MODEL_FOLDER = "model"


class LatentShard(NamedTuple):
    """One shard of latents to make from the shard of tiles with the same number and name."""

    split: str
    number: int
    name: str
    num_samples: int

    def tar(self, work: WorkFolder) -> Path:
        """Return the path of the tar in the work folder."""
        return work.data / self.split / self.name

    def sums(self, work: WorkFolder) -> Path:
        """Return the path of the shard's `leaf_sums`. The file is written before the tar is complete."""
        return work.path / "statistics" / f"{self.split}-{self.name}.json"

    def is_done(self, work: WorkFolder) -> bool:
        """Return True if the shard is complete."""
        return is_complete(self.tar(work))


def encode(
    model_name: str,
    shards: str,
    out: Path,
    options: EncodeOptions,
    ranks: Ranks,
    on_progress: OnProgress | None = None,
) -> dict[str, LatentManifest]:
    """Write latents to `out/{train,val,test}`, and the model with its factors to `out/model`. All ranks call this.

    If `out` already holds the same latents, nothing is written.

    Args:
        model_name: folder or hub id of a model.
        shards: folder or URL of a dataset or of one split.
        out: output folder that all ranks share.
        options: form of the latents.
        ranks: this process among all ranks.
        on_progress: called with the number of finished and of all tiles of this rank.
    Returns: manifest of each split.
    Raises: ValueError if model, shards, options or output do not fit.
    """
    out = out.resolve()
    readers = {name: ShardReader(store.location) for name, store in splits_to_make(shards).items()}
    model = load_model(model_name, ranks.device)
    encoder = Encoder(model, options)
    for reader in readers.values():
        _check_bands(reader, model, model_name)
    identity = _identity(encoder, readers)
    if ranks.broadcast_object(lambda: _is_complete(out, identity)):
        return _manifests(out, readers)
    latent_shards = [
        LatentShard(split, number, entry.name, entry.num_samples)
        for split, reader in readers.items()
        for number, entry in enumerate(reader.manifest.shards)
    ]
    with ExitStack() as held:
        ranks.broadcast_object(lambda: _begin(out, identity, readers, held))
        work = WorkFolder(out.with_name(f".{out.name}.partial"))
        done = ranks.broadcast_object(lambda: [shard.is_done(work) for shard in latent_shards])
        missing = [shard for shard, is_done in zip(latent_shards, done, strict=True) if not is_done]
        _encode_shards(encoder, readers, missing[ranks.rank :: ranks.world_size], work, on_progress)
        chosen = [shard for shard in latent_shards if shard.split == _statistics_split(readers)]
        sums = _join_sums(chosen, missing, model.config.latent_channels, work, ranks)
        ranks.broadcast_object(lambda: _finish(out, encoder, identity, readers, latent_shards, sums, work))
    return _manifests(out, readers)


def _check_bands(reader: ShardReader, model: AutoencoderKLMultispectralAdapter, name: str) -> None:
    bands = reader.manifest.bands
    if bands.wavelengths_nm != model.bands.wavelengths_nm:
        raise ValueError(
            f"{reader.store.location} holds {bands}, {name} expects {model.bands}; repack with --wavelengths, or use "
            "the model trained on these bands"
        )


def _identity(encoder: Encoder, readers: dict[str, ShardReader]) -> dict[str, Any]:
    """Return everything that determines the bytes of the latents, under the names used in messages."""
    options = asdict(encoder.options)
    if encoder.options.kind == "moments":
        options["seed"] = None
    tiles = {split: reader.manifest.digest() for split, reader in readers.items()}
    return {"model": encoder.sha256, **options, "tiles": tiles}


def _is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Return whether `out` holds these latents.

    Raises: ValueError if it holds something else.
    """
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
        raise ValueError(f"{out} holds latents of another {what}; name another OUT, or delete it to encode again")
    return True


def _begin(out: Path, identity: dict[str, Any], readers: dict[str, ShardReader], held: ExitStack) -> None:
    work = held.enter_context(work_folder(out, shared=False))
    options = {name: value for name, value in identity.items() if name != "tiles"}
    inputs = {reader.store.location: identity["tiles"][split] for split, reader in readers.items()}
    work.begin({"options": options, "inputs": inputs}, ["statistics"])
    for split in readers:
        (work.data / split).mkdir(exist_ok=True)


def _encode_shards(
    encoder: Encoder,
    readers: dict[str, ShardReader],
    latent_shards: Sequence[LatentShard],
    work: WorkFolder,
    on_progress: OnProgress | None,
) -> None:
    done, total = 0, sum(shard.num_samples for shard in latent_shards)
    for split, of_split in groupby(latent_shards, key=lambda shard: shard.split):
        reader, by_number = readers[split], {shard.number: shard for shard in of_split}
        plans = chain.from_iterable(
            in_micro_batches(
                (SampleRef(shard.number, row, slot=row) for row in range(shard.num_samples)),
                encoder.options.batch_size,
            )
            for shard in by_number.values()
        )
        loader = Loader(
            reader, plans, batch_size=encoder.options.batch_size, num_workers=2, device=encoder.model.device
        )
        for number, batches in groupby(loader, key=lambda batch: batch.plan.samples[0].shard):
            shard, sums = by_number[number], []
            with ShardWriter(shard.tar(work)) as writer:
                for batch in batches:
                    for sample, tile in zip(batch.plan.samples, encoder.encode(batch), strict=True):
                        mask = encode_mask(tile.leaf_mask)
                        writer.append(
                            tile.key, (LATENTS_ENDING, tile.npy), mask, reader.json_member(number, sample.row)
                        )
                        sums.append(tile.sums)
                    done += len(batch.keys)
                    if on_progress is not None:
                        on_progress(done, total)
                write_text(shard.sums(work), json.dumps(np.sum(sums, axis=0).tolist()))


def _statistics_split(readers: dict[str, ShardReader]) -> str:
    return SPLITS[0] if SPLITS[0] in readers else next(iter(readers))


def _join_sums(
    chosen: Sequence[LatentShard],
    missing: Sequence[LatentShard],
    num_channels: int,
    work: WorkFolder,
    ranks: Ranks,
) -> NDArray[np.float64]:
    """Return the sum of `leaf_sums` over the chosen shards.

    The rank that made a shard reads its sums. Rank 0 reads the sums of shards that an earlier run made.
    """
    made_by = {shard: number % ranks.world_size for number, shard in enumerate(missing)}
    rows = torch.zeros((len(chosen), 1 + 2 * num_channels), dtype=torch.float64)
    for row, shard in zip(rows, chosen, strict=True):
        if made_by.get(shard, 0) == ranks.rank:
            row.copy_(torch.tensor(json.loads(shard.sums(work).read_text()), dtype=torch.float64))
    # each row is 0 on all ranks but one, so the all-reduce is exact; then shards are added in their order
    joined: NDArray[np.float64] = ranks.all_reduce_sums({"rows": rows})["rows"].cpu().numpy()
    return np.add.accumulate(joined)[-1]  # type: ignore[no-any-return]


def _finish(
    out: Path,
    encoder: Encoder,
    identity: dict[str, Any],
    readers: dict[str, ShardReader],
    latent_shards: Sequence[LatentShard],
    sums: NDArray[np.float64],
    work: WorkFolder,
) -> None:
    statistics = leaf_latent_statistics(sums)
    shift_factor, scaling_factor = diffusion_factors(statistics)
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
            statistics=statistics,
            shards=Shards.of(shard_entry(shard.tar(work)) for shard in latent_shards if shard.split == split),
        )
        write_text(work.data / split / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")
    model.register_to_config(shift_factor=shift_factor, scaling_factor=scaling_factor, factors_of_leaves=True)
    model.save_pretrained(work.data / MODEL_FOLDER)
    for partial in work.data.glob("*/.*"):  # left behind by processes that were killed
        partial.unlink()
    move_folder(work.data, out)
    shutil.rmtree(work.path)


def _manifests(out: Path, splits: dict[str, ShardReader]) -> dict[str, LatentManifest]:
    return {split: LatentManifest.load(open_store(out / split)) for split in splits}
