"""Decode latents into reflectance: shards of latents into shards of tiles, an array of latents into GeoTIFFs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from msvae.bands import LeafStatistics
from msvae.files import replace_folder
from msvae.inference.load import choose_device, explain_out_of_memory, load_model, model_sha256
from msvae.inference.raster_output import GeoTiff
from msvae.messages import OnProgress, counted
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.rasters.gdal import gdal_session
from msvae.rasters.planes import Georeference, mapped_array
from msvae.shards.latents import LatentReader, LatentSample
from msvae.shards.leaf_accumulators import COVERAGE_BINS, LeafValues, coverage_bin
from msvae.shards.manifest import Manifest, ShardEntry, Shards
from msvae.shards.sample_codec import ENDINGS, encode_mask, encode_tile
from msvae.shards.splits import SPLITS, splits_to_make
from msvae.shards.writer import ShardWriter


def decode(
    model_name: str,
    latents: str,
    out: Path,
    *,
    unscaled: bool = False,
    batch_size: int = 8,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> int:
    """Decode latents into a new folder and return the number of tiles or images.

    Args:
        model_name: folder or hub id of a model.
        latents: a dataset of latents from `encode` or one split of it, which becomes shards of float32 tiles; or an
            `.npy` file (B, channels, h, w), where each latent becomes a GeoTIFF.
        out: new or empty folder.
        unscaled: latents of the `.npy` file are outputs of the encoder. By default they are outputs of a diffusion
            model, which are shifted and scaled by the factors of the model.
        batch_size: number of latents in a forward pass.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for a GPU if there is one.
        on_progress: called with the number of finished and of all tiles.
    Raises: ValueError if model, latents or output do not fit.
    """
    out = out.resolve()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} already exists; name a new folder")
    decoder = Decoder(load_model(model_name, choose_device(device)), batch_size)
    if latents.endswith(".npy"):
        return _decode_array(decoder, Path(latents), out, unscaled, on_progress)
    if unscaled:
        raise ValueError(f"got --unscaled for {latents}, but shards hold unscaled latents anyway; leave it out")
    return _decode_shards(decoder, model_name, latents, out, on_progress)


class Decoder:
    """Decodes unscaled latents (channels, h, w) in batches."""

    def __init__(self, model: AutoencoderKLMultispectralAdapter, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"got --batch-size {batch_size}, expected 1 or more")
        self.model, self._batch_size = model, batch_size

    @torch.inference_mode()
    def decode(self, latents: Iterator[NDArray[np.floating]]) -> Iterator[NDArray[np.float32]]:
        """Yield the reflectance (C, H, W) of each latent, in order.

        Raises: ValueError if the reflectance of a latent is not finite.
        """
        number = 0
        while batch := list(islice(latents, self._batch_size)):
            z_BChw = torch.from_numpy(np.stack(batch).astype(np.float32)).to(self.model.device)
            with explain_out_of_memory(counted(len(batch), "latent"), z_BChw, "--batch-size"):
                decoded = self.model.decode(z_BChw, return_dict=False)[0].float().cpu().numpy()
            for image_CHW in decoded:
                if not np.isfinite(image_CHW).all():
                    raise ValueError(
                        f"latent {number} decodes to values that are not finite; check its values, and that it is "
                        "scaled by the factors of this model"
                    )
                number += 1
                yield image_CHW


def _decode_array(decoder: Decoder, file: Path, out: Path, unscaled: bool, on_progress: OnProgress | None) -> int:
    latents, model = mapped_array(file), decoder.model
    channels = model.config.latent_channels
    if latents.ndim == 3:
        latents = latents[None]
    if latents.ndim != 4 or latents.shape[1] != channels or latents.dtype.kind != "f":
        raise ValueError(
            f"{file} holds {latents.dtype} of shape {latents.shape}, expected floats (B, {channels}, h, w); save "
            "latents of this model"
        )
    scaling, shift = model.config.scaling_factor, model.config.shift_factor or 0.0
    if not (unscaled or model.config.factors_of_leaves):
        raise ValueError(
            f"the model does not hold the factors by which the latents of {file} were shifted and scaled; name the "
            "model in the folder model/ of `msvae encode` (encode again if an earlier msvae wrote it), or give "
            "--unscaled if the latents are outputs of the encoder"
        )
    unscaled_latents = (each if unscaled else each.astype(np.float32) / scaling + shift for each in latents)
    bands = model.bands
    scales, offsets = (1.0,) * len(bands), (0.0,) * len(bands)
    with gdal_session(), replace_folder(out) as folder:
        for number, image_CHW in enumerate(decoder.decode(unscaled_latents)):
            path, shape = folder / f"{file.stem}-{number:04d}.tif", image_CHW.shape[1:]
            output = GeoTiff(path, shape, "float32", bands, scales, offsets, None, Georeference(), has_mask=False)
            output.write(0, 0, image_CHW, np.ones(shape, bool))
            output.close()
            if on_progress is not None:
                on_progress(number + 1, len(latents))
    return len(latents)


def _decode_shards(decoder: Decoder, model_name: str, location: str, out: Path, on_progress: OnProgress | None) -> int:
    readers = {name: LatentReader(store.location) for name, store in splits_to_make(location).items()}
    sha256 = model_sha256(decoder.model)
    for reader in readers.values():
        if reader.manifest.model_sha256 != sha256:
            raise ValueError(
                f"{reader.store.location} was encoded by another model than {model_name}; decode with the model in "
                "the folder model/ next to it"
            )
    total, done = sum(map(len, readers.values())), 0

    def count_tile() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    with replace_folder(out) as folder:
        written = {name: _decode_split(decoder, reader, folder / name, count_tile) for name, reader in readers.items()}
        statistics = written[SPLITS[0] if SPLITS[0] in written else next(iter(written))][1]
        for name, (entries, _) in written.items():
            _manifest(readers[name], entries, statistics).save(folder / name)
    return total


def _decode_split(
    decoder: Decoder, reader: LatentReader, folder: Path, count_tile: Callable[[], None]
) -> tuple[list[ShardEntry], LeafStatistics]:
    """Write shards of tiles. Return their entries for the manifest, and the statistics of their leaf pixels."""
    folder.mkdir()
    entries, num_bands = [], len(decoder.model.bands)
    values = LeafValues("float32", (1.0,) * num_bands, (0.0,) * num_bands)
    histogram = np.zeros(COVERAGE_BINS, np.int64)
    for shard, entry in enumerate(reader.manifest.shards):
        with ShardWriter(folder / entry.name) as writer:
            for sample, tile_CHW in _decoded(decoder, reader, shard):
                member = ENDINGS["none"], encode_tile(tile_CHW, "none")
                writer.append(sample.key, member, encode_mask(sample.leaf_mask), sample.about)
                values.add(tile_CHW, sample.leaf_mask)
                histogram[coverage_bin(int(sample.leaf_mask.sum()), sample.leaf_mask.size)] += 1
                count_tile()
        assert writer.entry is not None
        entries.append(writer.entry)
    return entries, values.result(histogram.tolist())


def _decoded(decoder: Decoder, reader: LatentReader, shard: int) -> Iterator[tuple[LatentSample, NDArray[np.float32]]]:
    """Yield each sample of a shard with its decoded tile (C, H, W). At most one batch of samples is in memory."""
    undecoded: deque[LatentSample] = deque()

    def modes() -> Iterator[NDArray[np.floating]]:
        for sample in reader.samples(shard):
            undecoded.append(sample)
            # the first channels of moments are the mean
            yield sample.latents[: reader.manifest.latent_channels]

    for tile_CHW in decoder.decode(modes()):
        yield undecoded.popleft(), tile_CHW


def _manifest(reader: LatentReader, entries: list[ShardEntry], statistics: LeafStatistics) -> Manifest:
    latents = reader.manifest
    num_bands = len(latents.band_names)
    return Manifest(
        band_names=latents.band_names,
        wavelengths_nm=latents.wavelengths_nm,
        dtype="float32",
        tile_px=latents.tile_px,
        scale=[1.0] * num_bands,
        offset=[0.0] * num_bands,
        statistics=statistics,
        shards=Shards.of(entries),
    )
