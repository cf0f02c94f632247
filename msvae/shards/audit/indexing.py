"""Write `manifest.json` and indexes for existing tars. Each tar is read once, checked, hashed and measured."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from msvae.bands import Bands, LeafStatistics
from msvae.messages import OnProgress, counted
from msvae.shards.audit.across_shards import ByteProgress, KeyRegister, in_order
from msvae.shards.audit.tar_samples import (
    DecodedSample,
    Endings,
    TileFormat,
    choose_members,
    decode_sample,
    group_members,
)
from msvae.shards.audit.walk import HashedStream, walk
from msvae.shards.leaf_accumulators import LeafCounts
from msvae.shards.manifest import (
    COLUMNS,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    ShardIndex,
    Shards,
    index_name,
)
from msvae.shards.reader import MAX_EXTRA_BYTES
from msvae.shards.reflectance import BRIGHT, check_offset, check_scale, too_bright, usual_scale
from msvae.shards.splits import SPLITS, find_tars
from msvae.shards.stores.store import Store

TRAIN = SPLITS[0]


@dataclass(frozen=True)
class IndexOptions:
    """Facts about the tiles that a tar does not state. None uses the existing manifest, if there is one.

    Raises: ValueError if a scale or offset is not plausible.
    """

    bands_member: str = ""
    """Ending of the tile, such as `bands.npy`. Empty means the only `.npy` of a sample."""
    mask_member: str = ""
    """Ending of the mask, such as `mask.png`. Empty means the only `.png` of a sample."""
    wavelengths_nm: tuple[float, ...] | None = None
    band_names: tuple[str, ...] | None = None
    scale: tuple[float, ...] | None = None
    """Factor from stored value to reflectance: one for all bands, or one per band."""
    offset: tuple[float, ...] | None = None
    overwrite: bool = False
    """Replace an existing manifest."""
    num_threads: int = 4

    def __post_init__(self) -> None:
        check_scale(self.scale or ())
        check_offset(self.offset or ())

    @property
    def endings(self) -> Endings:
        """Endings of the tile and mask members."""
        return Endings(self.bands_member, self.mask_member)


@dataclass(frozen=True)
class SplitFormat:
    """Format of the tiles of a split, their bands, and reflectance = stored * scale + offset, one entry per band."""

    tile_format: TileFormat
    bands: Bands
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    scale_assumed: bool
    """True if tiles are floats and no scale was given, so that the scale 1 is a guess."""


@dataclass
class IndexedSplit:
    """Shards of a split and the statistics of their leaf pixels."""

    folder: Path
    leaf: LeafCounts
    entries: list[ShardEntry] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """Number of tiles in all shards."""
        return sum(entry.num_samples for entry in self.entries)


def index_dataset(
    location: str, out: Path | None, options: IndexOptions, on_progress: OnProgress | None = None
) -> dict[str, IndexedSplit]:
    """Write manifest and indexes of a dataset, next to its tars or into `out`.

    The files of a split are written after all its tars were found valid.

    Args:
        location: folder or URL of a dataset or of one split.
        out: folder for the files; None writes next to the tars, which must be in a local folder.
        options: facts that the tars do not state.
        on_progress: called with bytes done and total.
    Returns: the splits by name.
    Raises: ValueError with shard, sample and fix for the first fault.
    """
    stores = find_tars(location)
    if len(stores) > 1 and TRAIN not in stores:
        raise ValueError(
            f"{location} holds {', '.join(stores)} but no {TRAIN}, whose statistics every split needs; add it, "
            "or index one split alone"
        )
    existing = _existing_manifest(stores, options.overwrite)
    folders = {
        name: _output_folder(store, name if len(stores) > 1 else "", out, options.overwrite)
        for name, store in stores.items()
    }
    tars = {name: [file for file in store.names() if file.endswith(".tar")] for name, store in stores.items()}
    sizes = {name: [store.size_bytes(tar) for tar in tars[name]] for name, store in stores.items()}
    first = next(iter(stores))
    split_format = _split_format(
        _first_format(stores[first], tars[first][0], options.endings), options, existing, location
    )
    progress = ByteProgress(sum(map(sum, sizes.values())), on_progress)
    done: dict[str, IndexedSplit] = {}
    for name, store in stores.items():
        statistics = done[first].leaf.statistics() if done else None
        shards = list(zip(tars[name], sizes[name], strict=True))
        done[name] = _index_split(store, folders[name], shards, split_format, statistics, options, progress)
    return done


def _existing_manifest(stores: dict[str, Store], overwrite: bool) -> Manifest | None:
    """Return the manifest that is already there, if any.

    Raises: ValueError if there is one and `overwrite` is False.
    """
    manifests = [store for store in stores.values() if MANIFEST_NAME in store.names()]
    if manifests and not overwrite:
        raise ValueError(
            f"{manifests[0].location} has a {MANIFEST_NAME}; check it with `msvae verify`, or give --overwrite to "
            "index the present tars again"
        )
    return Manifest.load(manifests[0]) if manifests else None


def _output_folder(store: Store, name: str, out: Path | None, overwrite: bool) -> Path:
    """Return the folder for manifest and indexes of a split.

    Raises: ValueError if the tars are at a URL and `out` is None, or if a manifest would be replaced.
    """
    if out is None and "://" in store.location:
        raise ValueError(
            f"{store.location} is a URL, and index files are not written to it; give --out FOLDER, and copy its "
            "files next to the tars"
        )
    folder = Path(store.location) if out is None else out / name
    if not overwrite and (folder / MANIFEST_NAME).exists():
        raise ValueError(f"{folder} has a {MANIFEST_NAME}; give --overwrite to replace it, or another --out")
    return folder


def _index_split(
    store: Store,
    folder: Path,
    shards: list[tuple[str, int]],
    split_format: SplitFormat,
    statistics: LeafStatistics | None,
    options: IndexOptions,
    progress: ByteProgress,
) -> IndexedSplit:
    split = IndexedSplit(
        folder, LeafCounts(split_format.tile_format.dtype.name, split_format.scale, split_format.offset)
    )
    register, num_threads = KeyRegister(), split.leaf.threads_that_fit(options.num_threads)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {folder} ({error.strerror}); give another --out") from None
    with tempfile.TemporaryDirectory(prefix=".index-", dir=folder) as scratch:
        one = partial(_index_shard, store, split_format=split_format, endings=options.endings, progress=progress)
        for number, (index, leaf) in enumerate(in_order(lambda shard: one(*shard), shards, num_threads)):
            name, size_bytes = shards[number]
            content = index.model_dump_json() + "\n"
            (Path(scratch) / index_name(name)).write_text(content)
            digest = hashlib.sha256(content.encode()).hexdigest()
            split.entries.append(ShardEntry(name, len(index.keys), size_bytes, digest))
            split.leaf.join(leaf)
            register.add(number, index.keys)
        _refuse_repeated(store, register, Path(scratch), [name for name, _ in shards])
        try:
            manifest = _manifest(split_format, statistics or split.leaf.statistics(), split.entries)
        except ValueError as error:
            raise ValueError(f"{store.location}: {error}") from None
        if split_format.scale_assumed and statistics is None and split.leaf.share_above(BRIGHT) > 0.5:
            raise too_bright(store.location)
        for name, _ in shards:
            (Path(scratch) / index_name(name)).replace(folder / index_name(name))
        manifest.save(Path(scratch))
        (Path(scratch) / MANIFEST_NAME).replace(folder / MANIFEST_NAME)
    return split


def _index_shard(
    store: Store, name: str, size_bytes: int, *, split_format: SplitFormat, endings: Endings, progress: ByteProgress
) -> tuple[ShardIndex, LeafCounts]:
    columns: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    leaf, seen = LeafCounts(split_format.tile_format.dtype.name, split_format.scale, split_format.offset), set()
    stream = HashedStream(store, name, progress.add)
    try:
        for sample in group_members(walk(stream.span, size_bytes), stream.span):
            if sample.key in seen:
                raise ValueError(
                    f"sample {sample.key} occurs twice or its members are not neighbours; give each sample a unique "
                    "key and write the tar again"
                )
            seen.add(sample.key)
            decoded = decode_sample(sample, endings, split_format.tile_format)
            _refuse_mask_far_away(decoded)
            leaf.add(decoded.tile, decoded.leaf_mask)
            for column, value in _row(decoded):
                columns[column].append(value)
    except ValueError as error:
        raise ValueError(f"{store.location}/{name}: {error}") from None
    if not seen:
        raise ValueError(f"{store.location}/{name} holds no sample; remove it")
    return ShardIndex(sha256=stream.sha256(), **columns), leaf


def _refuse_mask_far_away(decoded: DecodedSample) -> None:
    """Check that tile and mask are close to each other, because training reads both at once."""
    first, second = sorted((decoded.bands, decoded.mask), key=lambda member: member.offset)
    between = second.offset - first.offset - first.size_bytes
    if between + decoded.mask.size_bytes > MAX_EXTRA_BYTES:
        raise ValueError(
            f"sample {decoded.key} has {between:,} bytes between tile and mask, expected at most 1 MiB with the mask; "
            "put the mask next to the tile and write the tar again"
        )


def _row(decoded: DecodedSample) -> Iterator[tuple[str, Any]]:
    yield "keys", decoded.key
    for name, member in (("bands", decoded.bands), ("mask", decoded.mask), ("json", decoded.json)):
        yield f"{name}_offset", member.offset if member else 0
        yield f"{name}_bytes", member.size_bytes if member else 0
    yield "crc32c", decoded.crc32c
    yield "json_crc32c", decoded.json_crc32c


def _refuse_repeated(store: Store, register: KeyRegister, folder: Path, names: list[str]) -> None:
    def keys_of(shard: int) -> list[str]:
        return ShardIndex.model_validate_json((folder / index_name(names[shard])).read_bytes()).keys

    for key, shards in register.repeated(keys_of):
        raise ValueError(
            f"{store.location}: sample {key} is in {' and in '.join(names[shard] for shard in shards)}; give each "
            "sample a unique key"
        )


def _manifest(split_format: SplitFormat, statistics: LeafStatistics, entries: list[ShardEntry]) -> Manifest:
    return Manifest(
        band_names=list(split_format.bands.names),
        wavelengths_nm=list(split_format.bands.wavelengths_nm),
        dtype=split_format.tile_format.dtype.name,
        tile_px=split_format.tile_format.shape[1],
        scale=list(split_format.scale),
        offset=list(split_format.offset),
        statistics=statistics,
        shards=Shards.of(entries),
    )


def _first_format(store: Store, name: str, endings: Endings) -> TileFormat:
    stream = HashedStream(store, name)
    try:
        sample = next(group_members(walk(stream.span, store.size_bytes(name)), stream.span), None)
        if sample is None:
            raise ValueError("holds no sample; remove it")
        (_, npy), _ = choose_members(sample, endings)
        try:
            return TileFormat.of_npy(npy)
        except ValueError as error:
            raise ValueError(f"sample {sample.key} {error}") from None
    except ValueError as error:
        raise ValueError(f"{store.location}/{name}: {error}") from None


def _split_format(
    tile_format: TileFormat, options: IndexOptions, existing: Manifest | None, location: str
) -> SplitFormat:
    """Return the format with bands, scale and offset from the options, else from the existing manifest."""
    num_bands = tile_format.shape[0]
    wavelengths_nm = options.wavelengths_nm or (existing and tuple(existing.wavelengths_nm))
    names = options.band_names or (existing and not options.wavelengths_nm and tuple(existing.band_names)) or None
    if not wavelengths_nm:
        raise ValueError(
            f"{location} holds tiles of {counted(num_bands, 'band')}; give --wavelengths, {num_bands} of them in nm"
        )
    if len(wavelengths_nm) != num_bands:
        raise ValueError(
            f"got {counted(len(wavelengths_nm), 'wavelength')}, the tiles of {location} have "
            f"{counted(num_bands, 'band')}"
        )
    kept_scale, kept_offset = (existing and tuple(existing.scale)), (existing and tuple(existing.offset))
    scale = options.scale or kept_scale or ((1.0,) if tile_format.dtype.kind == "f" else None)
    if scale is None:
        raise ValueError(
            f"{location} holds {tile_format.dtype} tiles; give --scale, the reflectance of the stored value 1, "
            f"such as {usual_scale(tile_format.dtype.name)}"
        )
    return SplitFormat(
        tile_format,
        Bands.named(wavelengths_nm, names),
        _one_per_band("--scale", scale, num_bands),
        _one_per_band("--offset", options.offset or kept_offset or (0.0,), num_bands),
        scale_assumed=not (options.scale or kept_scale),
    )


def _one_per_band(option: str, values: tuple[float, ...], num_bands: int) -> tuple[float, ...]:
    if len(values) not in (1, num_bands):
        raise ValueError(
            f"got {counted(len(values), 'value')} for {option}, expected 1 or one for each of {num_bands} bands"
        )
    return values * num_bands if len(values) == 1 else values
