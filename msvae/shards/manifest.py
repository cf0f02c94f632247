"""Metadata of a split: `manifest.json` for the whole split, and one index file per tar.

`shards/README.md` specifies the format.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from msvae.bands import Bands, LeafStatistics
from msvae.shards.stores import open_store
from msvae.shards.stores.store import MissingError, Store

MANIFEST_NAME = "manifest.json"
MAX_JSON_BYTES = 2**30
"""Limit of a manifest or index in bytes, enough for seven million shards."""
TILE_STEP_PX = 8
"""Divisor of the side of a tile, because the backbone halves a tile three times."""
MAX_SAMPLE_JSON_BYTES = 2**20
"""Limit of the JSON of one sample in bytes."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


ByteNumber = Annotated[int, Field(ge=0, lt=2**62)]
RecordT = TypeVar("RecordT", bound=_Record)


class ShardEntry(NamedTuple):
    """One tar and its index. The index contains the SHA-256 of the tar, so `index_sha256` covers both files."""

    name: str
    num_samples: int
    size_bytes: int
    index_sha256: str


class Shards(_Record):
    """All tars of a split as columns, so that a million of them can be read in seconds."""

    name: list[str]
    num_samples: list[NonNegativeInt]
    size_bytes: list[PositiveInt]
    index_sha256: list[str]

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> Self:
        """Return the entries as columns."""
        columns = zip(*entries, strict=True)
        return cls(**dict(zip(ShardEntry._fields, map(list, columns), strict=False)))

    @model_validator(mode="after")
    def _one_entry_per_shard(self) -> Self:
        lengths = {name: len(getattr(self, name)) for name in ShardEntry._fields}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns have different lengths: {lengths}")
        return self

    @model_validator(mode="after")
    def _each_shard_once(self) -> Self:
        if len(set(self.name)) < len(self.name):
            name, count = Counter(self.name).most_common(1)[0]
            raise ValueError(f"lists {name} {count} times, so its samples would be read {count} times per epoch")
        return self

    @model_validator(mode="after")
    def _names_have_no_folder(self) -> Self:
        for name in self.name:
            if "/" in name or "\\" in name or name.startswith("."):
                raise ValueError(
                    f"{name!r} is not a valid file name of a shard: it must not contain a folder or start with a dot"
                )
        return self

    def __len__(self) -> int:
        return len(self.name)

    def __getitem__(self, shard: int) -> ShardEntry:
        return ShardEntry(*(getattr(self, name)[shard] for name in ShardEntry._fields))

    def __iter__(self) -> Iterator[ShardEntry]:  # type: ignore[override]  # iterates over shards, not over fields
        return (self[shard] for shard in range(len(self)))


class Manifest(_Record):
    """A split: format and bands of its tiles (reflectance = stored * scale + offset), statistics, and shards."""

    format: Literal["msvae-shards"] = "msvae-shards"
    version: Literal[1] = 1
    band_names: list[str]
    wavelengths_nm: list[float]
    dtype: Literal["uint8", "uint16", "int16", "float32"]
    tile_px: PositiveInt
    scale: list[float]
    offset: list[float]
    compression: Literal["none", "delta-blosc2"] = "none"
    """Compression of the bands member of every sample."""
    statistics: LeafStatistics
    """Statistics of the training split. Every split holds them, so that each can be used alone."""
    shards: Shards

    @model_validator(mode="after")
    def _one_entry_per_band(self) -> Manifest:
        lengths = {name: len(getattr(self, name)) for name in ("band_names", "wavelengths_nm", "scale", "offset")} | {
            f"statistics.{name}": len(getattr(self.statistics, name)) for name in ("mean", "std", "covariance")
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"fields have entries for different numbers of bands: {lengths}")
        return self

    @property
    def bands(self) -> Bands:
        """The bands in stored order."""
        return Bands(tuple(self.wavelengths_nm), tuple(self.band_names))

    @property
    def num_samples(self) -> int:
        """Number of tiles in all shards."""
        return sum(self.shards.num_samples)

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON, which covers every byte of every shard and index."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @classmethod
    def load(cls, location: str | Path | Store) -> Manifest:
        """Read `manifest.json` of a folder or URL.

        Raises: ValueError if it is missing, not a manifest, or lists no samples.
        """
        store = open_store(location) if isinstance(location, (str, Path)) else location
        try:
            manifest = _parse(cls, store, MANIFEST_NAME)
        except MissingError:
            splits = [path.parent for path in sorted(Path(store.location).glob(f"*/{MANIFEST_NAME}"))]
            inside = next((split for split in splits if split.name == "train"), splits[0] if splits else None)
            hint = f"did you mean {inside}?" if inside else "make shards with `msvae pack IMAGE… --out DIR`"
            raise ValueError(f"{store.location} holds no {MANIFEST_NAME}; {hint}") from None
        if not manifest.num_samples:
            raise ValueError(
                f"{store.path(MANIFEST_NAME)} lists no samples; this split is empty, pack more images or larger "
                "--split shares"
            )
        return manifest

    def save(self, folder: Path) -> None:
        """Write `folder/manifest.json`."""
        (folder / MANIFEST_NAME).write_text(self.model_dump_json(indent=1) + "\n")


class ShardIndex(_Record):
    """Position of each sample in one tar, as columns: byte offset and length of every member."""

    sha256: str
    """SHA-256 of the tar."""
    keys: list[str]
    bands_offset: list[ByteNumber]
    bands_bytes: list[Annotated[ByteNumber, Field(gt=0)]]
    mask_offset: list[ByteNumber]
    mask_bytes: list[Annotated[ByteNumber, Field(gt=0)]]
    json_offset: list[ByteNumber]
    json_bytes: list[Annotated[ByteNumber, Field(le=MAX_SAMPLE_JSON_BYTES)]]
    """Length of the JSON, 0 for a sample without JSON."""
    crc32c: list[ByteNumber]
    """CRC-32C of the bands member followed by the mask member."""
    json_crc32c: list[ByteNumber] | None = None
    """CRC-32C of the JSON, 0 for a sample without JSON. None in indexes that are older than this column."""

    @classmethod
    def load(cls, store: Store, shard: ShardEntry) -> ShardIndex:
        """Read the index of a tar.

        Raises: ValueError if it is missing, altered, or does not match the manifest.
        """
        name = index_name(shard.name)
        index = _parse(cls, store, name, expected_sha256=shard.index_sha256)
        columns = {len(values) for column in COLUMNS if (values := getattr(index, column)) is not None}
        if columns != {shard.num_samples}:
            raise ValueError(
                f"{store.path(name)} has columns of {sorted(columns)} samples, the manifest expects "
                f"{shard.num_samples}; restore the split from its source or pack it again"
            )
        return index

    def last_byte(self, row: int) -> int:
        """Return the byte offset at which the last member of a sample ends."""
        names = ("bands", "mask", "json")
        return int(max(getattr(self, f"{name}_offset")[row] + getattr(self, f"{name}_bytes")[row] for name in names))


COLUMNS = tuple(name for name in ShardIndex.model_fields if name != "sha256")
"""Fields of an index with one entry per sample."""


def index_name(shard_name: str) -> str:
    """Return the name of the index of a tar, such as `leaf-000000.index.json` for `leaf-000000.tar`."""
    return f"{shard_name.removesuffix('.tar')}.index.json"


def _parse(record: type[RecordT], store: Store, name: str, expected_sha256: str | None = None) -> RecordT:
    path = store.path(name)
    content = store.read(name, MAX_JSON_BYTES)
    if expected_sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise ValueError(f"{path} was altered: its SHA-256 is not that in the manifest; restore it or pack again")
    try:
        return record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path}: {field}: {first['msg']}; restore it or pack this split again") from error
