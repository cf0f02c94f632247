"""Check one shard from its first byte to its last. Every fault is recorded, and reading continues after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from crc32c import crc32c

from msvae.messages import counted
from msvae.shards.audit.tar_samples import Endings, TarPart, TarSample, TileFormat, decode_sample, group_members
from msvae.shards.audit.walk import HashedStream, Member, walk
from msvae.shards.leaf_accumulators import LeafCounts
from msvae.shards.manifest import Manifest, ShardEntry, ShardIndex, index_name
from msvae.shards.stores.store import Store

REPLACE = "restore it from its source, or make this split again"


class Fault(NamedTuple):
    """A file, what is wrong with it or with one of its samples, and what to do."""

    file: str
    message: str


@dataclass
class VerifiedShard:
    """Content and faults of a shard."""

    leaf: LeafCounts
    faults: list[Fault] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Keys in the index, empty if the index cannot be read."""
    num_samples: int = 0
    """Number of valid samples."""
    num_bytes: int = 0
    nonfinite_background: int = 0
    """Number of background pixels with NaN or infinity in any band. They are not a fault."""


class ShardCheck:
    """Checks one shard, and collects its content and faults in `result`."""

    def __init__(self, store: Store, manifest: Manifest, shard: ShardEntry, on_read: Callable[[int], None]) -> None:
        self._store, self._shard = store, shard
        self._on_read = on_read
        self._format = TileFormat.of_manifest(manifest)
        self._unseen: dict[int, int] = {}
        """Rows of the index whose samples have not been found in the tar yet, by the offset of their tile."""
        self._index: ShardIndex | None = None
        self.result = VerifiedShard(LeafCounts(manifest.dtype, manifest.scale, manifest.offset))

    def run(self) -> VerifiedShard:
        """Check index, size, members, samples and hashes. Returns: the result."""
        try:
            self._index = ShardIndex.load(self._store, self._shard)
            self.result.keys = self._index.keys
            self._unseen = {offset: row for row, offset in enumerate(self._index.bands_offset)}
        except ValueError as error:
            self._fault(str(error), index_name(self._shard.name))
        try:
            self._read_tar(self._store.size_bytes(self._shard.name))
        except (ValueError, OSError) as error:
            self._fault(str(error))
        return self.result

    def _fault(self, message: str, name: str = "") -> None:
        file = f"{self._store.location}/{name or self._shard.name}"
        self.result.faults.append(Fault(file, message.removeprefix(f"{file}: ").removeprefix(f"{file} ")))

    def _read_tar(self, size_bytes: int) -> None:
        self.result.num_bytes = size_bytes
        if size_bytes != self._shard.size_bytes:
            self._fault(
                f"has {size_bytes:,} bytes, the manifest expects {self._shard.size_bytes:,}: it was truncated or "
                f"replaced; {REPLACE}"
            )
        stream, whole, empty = HashedStream(self._store, self._shard.name, self._on_read), True, True
        try:
            for sample in group_members(walk(stream.span, size_bytes), stream.span):
                empty = False
                self._check_sample(sample)
        except ValueError as error:
            self._fault(str(error))
            whole = False
        self._check_unseen(size_bytes, whole)
        if whole and empty:
            self._fault(f"holds no sample; {REPLACE}")
        if self._index is not None and stream.sha256() != self._index.sha256:
            self._fault(
                f"is not the tar that was indexed, because its SHA-256 differs from that in the index; {REPLACE}"
            )

    def _check_sample(self, sample: TarSample) -> None:
        row = self._row_of(sample)
        if self._index is None:
            self._take(sample, Endings(self._format.ending))
        elif row is None:
            self._fault(f"sample {sample.key} is not at the offset in the index, or is not in the index; {REPLACE}")
        elif self._index.keys[row] != sample.key:
            self._fault(f"sample {sample.key} has the key {self._index.keys[row]} in the index; {REPLACE}")
        else:
            self._check_indexed(sample, row, self._index)

    def _row_of(self, sample: TarSample) -> int | None:
        rows = (self._unseen.pop(part.member.offset, None) for part in sample.parts.values())
        return next((row for row in rows if row is not None), None)

    def _check_indexed(self, sample: TarSample, row: int, index: ShardIndex) -> None:
        endings = {}
        for name in ("bands", "mask", "json"):
            expected = (getattr(index, f"{name}_offset")[row], getattr(index, f"{name}_bytes")[row])
            found = [ending for ending, part in sample.parts.items() if part.member[1:] == expected]
            if not found and expected != (0, 0):
                self._fault(
                    f"sample {sample.key} has no member of {expected[1]:,} bytes at byte {expected[0]:,}, where the "
                    f"index expects its {name}; {REPLACE}"
                )
                return
            endings[name] = found[0] if found else ""
        bands, mask, json_member = (
            (sample.parts[found].content if found else None) or b"" for found in endings.values()
        )
        checksums = {"its checksum": (crc32c(mask, crc32c(bands)), index.crc32c[row])}
        if index.json_crc32c is not None:
            checksums["the checksum of its JSON"] = crc32c(json_member), index.json_crc32c[row]
        for what, (checksum, wanted) in checksums.items():
            if checksum != wanted:
                mismatch = f"{what} is {checksum:08x}, the index expects {wanted:08x}"
                self._fault(f"sample {sample.key} is altered: {mismatch}; {REPLACE}")
                return
        self._take(sample, Endings(endings["bands"], endings["mask"]))

    def _take(self, sample: TarSample, endings: Endings) -> None:
        try:
            decoded = decode_sample(sample, endings, self._format)
        except ValueError as error:
            self._fault(str(error))
            return
        num_nonfinite = self.result.leaf.add(decoded.tile, decoded.leaf_mask)
        self.result.num_samples += 1
        if decoded.tile.dtype.kind == "f":
            all_nonfinite = int((~np.isfinite(decoded.tile).all(axis=0)).sum())
            self.result.nonfinite_background += all_nonfinite - num_nonfinite
        if num_nonfinite:
            self._fault(
                f"sample {sample.key} has {counted(num_nonfinite, 'leaf pixel')} of NaN or infinity; mask them and "
                "make this split again"
            )
        if not decoded.leaf_mask.any():
            self._fault(f"sample {sample.key} has an empty mask: no pixel is leaf; leave it out")

    def _check_unseen(self, size_bytes: int, whole: bool) -> None:
        """Check samples of the index that were not found: they are missing, or follow a damaged part of the tar."""
        if self._index is None:
            return
        lost = []
        for row in list(self._unseen.values()):
            key = self._index.keys[row]
            if whole:
                self._fault(f"sample {key} is in the index but not in the tar; {REPLACE}")
            elif self._index.last_byte(row) > size_bytes:
                lost.append(key)
            else:
                self._check_indexed(self._by_offset(row, self._index), row, self._index)
        if lost:
            which = f"sample {lost[0]} is" if len(lost) == 1 else f"{len(lost)} samples, from {lost[0]} on, are"
            self._fault(f"{which} lost, because the file ends too early; {REPLACE}")

    def _by_offset(self, row: int, index: ShardIndex) -> TarSample:
        sample = TarSample(index.keys[row])
        for name, ending in (("bands", self._format.ending or "bands.npy"), ("mask", "mask.png"), ("json", "json")):
            offset, size = getattr(index, f"{name}_offset")[row], getattr(index, f"{name}_bytes")[row]
            if size:
                content = self._store.read_span(self._shard.name, offset, size)
                sample.parts[ending] = TarPart(Member(ending, offset, size), content)
        return sample
