"""Random access to the samples of a split, and the replacement of samples that cannot be read."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from msvae.shards.cache import SpanCache
from msvae.shards.manifest import Manifest, ShardEntry, ShardIndex
from msvae.shards.order import MicroBatchPlan, SampleRef
from msvae.shards.sample_codec import decode_mask_into, decompress_into, npy_header
from msvae.shards.stores import open_store
from msvae.shards.stores.remote import RetryPolicy
from msvae.shards.stores.store import FileError

MAX_OPEN_INDEXES = 256
MAX_EXTRA_BYTES = 2**20
"""Limit of the bytes that one read returns in addition to the tile: tar headers, mask, and JSON between them."""

T = TypeVar("T")


class ShardReader:
    """The samples of one split, in a folder or at a URL. Several threads may use it at once.

    Reads go straight into the caller's arrays. Every read is checked against the checksum in the index.
    """

    def __init__(self, location: str | Path, cache: SpanCache | None = None, retry: RetryPolicy | None = None) -> None:
        self.store = open_store(location, retry)
        self.manifest = Manifest.load(self.store)
        self.tile_shape = (len(self.manifest.bands), self.manifest.tile_px, self.manifest.tile_px)
        self.dtype = np.dtype(self.manifest.dtype)
        self._npy_header = npy_header(self.tile_shape, self.dtype)
        self._tile_bytes = int(np.prod(self.tile_shape)) * self.dtype.itemsize
        self._cache = cache
        self._indexes: OrderedDict[int, Future[ShardIndex | str]] = OrderedDict()
        """Open indexes by shard. A string is the reason why an index cannot be read."""
        self._lock = threading.Lock()

    @property
    def samples_per_shard(self) -> list[int]:
        """Number of samples in each shard, in manifest order."""
        return self.manifest.shards.num_samples

    def key(self, shard: int, row: int) -> str:
        """Return the key of one sample. Raises: ValueError if the index of its shard cannot be read."""
        return self._index(shard).keys[row]

    def sample_name(self, shard: int, row: int) -> str:
        """Return the name of a sample for messages: its key, or row and shard if the index cannot be read."""
        try:
            return self.key(shard, row)
        except (ValueError, OSError):
            return f"sample {row} of {self.manifest.shards[shard].name}"

    def read_into(self, shard: int, row: int, tile_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]) -> str:
        """Read one sample into `tile_CHW`, in its stored type, and `leaf_HW`.

        Returns: the key of the sample.
        Raises: ValueError with shard and key if bytes are missing, altered, or do not match the manifest.
        """
        return self._read_into(shard, row, tile_CHW, leaf_HW)[0]

    def members(self, shard: int, row: int) -> dict[str, str | bytes]:
        """Return one sample in the form of webdataset.

        Returns: a dictionary of `__key__`, `__url__`, and the bytes of `bands.npy`, `mask.png` and `json` (if any).
        Raises: ValueError as `read_into` does.
        """
        tile_CHW, leaf_HW = np.empty(self.tile_shape, self.dtype), np.empty(self.tile_shape[1:], np.bool_)
        key, png = self._read_into(shard, row, tile_CHW, leaf_HW)
        json_member = self.json_member(shard, row)
        return {
            "__key__": key,
            "__url__": self.store.path(self.manifest.shards[shard].name),
            "bands.npy": self._npy_header + tile_CHW.tobytes(),
            "mask.png": png,
            **({"json": json_member} if json_member else {}),
        }

    def json_member(self, shard: int, row: int) -> bytes:
        """Return the JSON of one sample, empty if it has none.

        It is checked unless the index was made before checksums of JSON existed.
        Raises: ValueError with shard and key if it is missing or altered.
        """
        entry, index = self.manifest.shards[shard], self._index(shard)
        content = bytearray(index.json_bytes[row])
        if content:
            sample = f"{self.store.path(entry.name)}: the JSON of sample {index.keys[row]}"
            expected = None if index.json_crc32c is None else index.json_crc32c[row]
            self._fill(entry, index.json_offset[row], [memoryview(content)], lambda: crc32c(content), expected, sample)
        return bytes(content)

    def json_object(self, shard: int, row: int) -> dict[str, Any]:
        """Return the parsed JSON of one sample, empty if it has none or the JSON is not an object.

        Raises: ValueError with shard and key if it is missing, altered, or does not parse.
        """
        try:
            content = json.loads(self.json_member(shard, row) or b"{}")
        except json.JSONDecodeError as error:
            sample = f"{self.store.path(self.manifest.shards[shard].name)}: sample {self.key(shard, row)}"
            raise ValueError(
                f"{sample} has broken JSON ({error}); restore the shard or pack this split again"
            ) from error
        return content if isinstance(content, dict) else {}

    def _read_into(
        self, shard: int, row: int, tile_CHW: NDArray[Any], leaf_HW: NDArray[np.bool_]
    ) -> tuple[str, bytes]:
        """Read one sample. Returns: its key and the bytes of its mask member."""
        entry, index = self.manifest.shards[shard], self._index(shard)
        sample = f"{self.store.path(entry.name)}: sample {index.keys[row]}"
        span = _Span.of(index, row)
        if span.num_bytes > self._tile_bytes + MAX_EXTRA_BYTES:
            raise ValueError(f"{sample} has {span.num_bytes} bytes, too many for its tile; pack this split again")
        compressed = self.manifest.compression != "none"
        if not compressed and index.bands_bytes[row] != len(self._npy_header) + tile_CHW.nbytes:
            raise ValueError(
                f"{sample} holds {index.bands_bytes[row]} bytes, expected {len(self._npy_header) + tile_CHW.nbytes} "
                f"for {self.dtype} tiles of shape {self.tile_shape}; pack this split again"
            )
        head = bytearray(index.bands_bytes[row] if compressed else len(self._npy_header))
        bands = [memoryview(head)] if compressed else [memoryview(head), tile_CHW.data.cast("B")]
        png = self._read_members(entry, index, row, span, bands, sample)
        try:
            if compressed:
                decompress_into(head, tile_CHW)
            elif head != self._npy_header:
                raise ValueError(f"is not a {self.dtype} array of shape {self.tile_shape}")
            decode_mask_into(png, leaf_HW)
        except ValueError as error:
            raise ValueError(f"{sample} {error}; pack this split again") from error
        return index.keys[row], png

    def _read_members(
        self, entry: ShardEntry, index: ShardIndex, row: int, span: _Span, bands: list[memoryview], sample: str
    ) -> bytes:
        """Fill the buffers of the bands member. Returns: the bytes of the mask member."""
        before, after = bytearray(span.before_bands), bytearray(span.after_bands)
        buffers = [part for part in (memoryview(before), *bands, memoryview(after)) if part]

        def png() -> bytes:
            around = before if span.mask_first else after
            return bytes(around[span.mask_start : span.mask_start + index.mask_bytes[row]])

        def checksum() -> int:
            crc = 0
            for part in (*bands, png()):
                crc = crc32c(part, crc)
            return crc

        self._fill(entry, span.offset, buffers, checksum, index.crc32c[row], sample)
        return png()

    def _fill(
        self,
        entry: ShardEntry,
        offset: int,
        buffers: list[memoryview],
        checksum: Callable[[], int],
        expected: int | None,
        sample: str,
    ) -> None:
        """Fill the buffers from the cache if it has these bytes, else from the store.

        No checksum is compared if `expected` is None."""
        cache = None if expected is None else self._cache
        if cache is not None:
            cache.read_into(entry, offset, buffers)
            if checksum() == expected:
                return
        num_bytes = sum(map(len, buffers))
        num_read = self.store.read_into(entry.name, offset, buffers, entry.size_bytes)
        if num_read != num_bytes or (found := checksum()) != (found if expected is None else expected):
            what = f"{num_read} of {num_bytes} bytes" if num_read != num_bytes else f"checksum {found:08x}"
            raise ValueError(
                f"{sample} is truncated or altered: {what}"
                + ("" if expected is None else f", the index expects checksum {expected:08x}")
                + "; restore the shard from its source or pack this split again"
            )
        if cache is not None:
            cache.write(entry, offset, buffers)

    def _index(self, shard: int) -> ShardIndex:
        """Return the index of a shard. The first thread that needs it reads it; a failure is remembered.

        Threads that need other indexes do not wait.
        """
        with self._lock:
            opened = self._indexes.get(shard)
            is_first = opened is None
            if opened is None:
                opened = self._indexes[shard] = Future()
                if len(self._indexes) > MAX_OPEN_INDEXES:
                    self._indexes.popitem(last=False)
            self._indexes.move_to_end(shard)
        if is_first:
            try:
                opened.set_result(ShardIndex.load(self.store, self.manifest.shards[shard]))
            except ValueError as error:  # an error in an index concerns the whole shard
                opened.set_result(str(error))
            except BaseException as error:
                opened.set_exception(error)
        index = opened.result()
        if isinstance(index, str):  # a stored exception would keep the tiles in its frames in memory
            raise FileError(index)
        return index


class _Span(NamedTuple):
    """Bytes that one read returns: tile and mask, and everything between them, such as the JSON."""

    offset: int
    before_bands: int
    """Number of bytes before the bands member."""
    after_bands: int
    """Number of bytes after the bands member."""
    mask_first: bool
    mask_start: int
    """Offset of the mask in the bytes before the bands member, or in the bytes after it."""
    num_bytes: int

    @classmethod
    def of(cls, index: ShardIndex, row: int) -> _Span:
        bands, mask = index.bands_offset[row], index.mask_offset[row]
        bands_end, mask_end = bands + index.bands_bytes[row], mask + index.mask_bytes[row]
        offset, end = min(bands, mask), max(bands_end, mask_end)
        mask_first = mask < bands
        mask_start = 0 if mask_first else mask - bands_end
        return cls(offset, bands - offset, end - bands_end, mask_first, mask_start, end - offset)


class BadSample(NamedTuple):
    """A sample that could not be read, and the key of the sample that replaced it."""

    slot: int
    key: str
    reason: str
    replaced_by: str


class BatchReader:
    """Reads the samples of micro batches, and replaces up to `max_bad_samples` samples that cannot be read.

    A bad sample is replaced by the next sample in stored order that can be read; the first sample follows the last
    one. This rule is the same on every rank.
    """

    def __init__(self, reader: ShardReader, max_bad_samples: int = 0) -> None:
        self._reader, self._max_bad_samples = reader, max_bad_samples
        self._reasons: dict[tuple[int, int], str] = {}
        """Reason of each bad sample, by shard and row. If a whole shard is bad, all its samples are listed."""
        self._lock = threading.Lock()
        parallel = reader.store.parallel_reads
        self._pool = ThreadPoolExecutor(parallel, "msvae-request") if parallel > 1 else None

    def map(self, read: Callable[[int, SampleRef], T], plan: MicroBatchPlan) -> list[T]:
        """Return `read(i, sample)` of every sample of a plan, in parallel if the store benefits from it."""
        apply = map if self._pool is None else self._pool.map
        return list(apply(read, range(len(plan.samples)), plan.samples))

    def read(self, sample: SampleRef, read: Callable[[int, int], T]) -> tuple[T, BadSample | None]:
        """Return `read(shard, row)` of a sample, or of its replacement together with a record of the bad sample.

        Raises: ValueError if more than `max_bad_samples` samples are bad.
        """
        shard, row = sample.shard, sample.row
        if (found := self._try(shard, row, read)) is not None:
            return found, None
        for _ in range(self._reader.manifest.num_samples - 1):
            shard, row = self._next(shard, row)
            if (found := self._try(shard, row, read)) is not None:
                name, reason = self._reader.sample_name(sample.shard, sample.row), self._reasons[sample[:2]]
                return found, BadSample(sample.slot, name, reason, self._reader.key(shard, row))
        raise ValueError(f"no sample of {self._reader.store.location} can be read; restore it or pack it again")

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _try(self, shard: int, row: int, read: Callable[[int, int], T]) -> T | None:
        """Return the result of `read`, or None if the sample is bad. A known bad sample is not read again."""
        with self._lock:
            if (shard, row) in self._reasons:
                return None
        try:
            return read(shard, row)
        except (ValueError, OSError) as error:
            rows = range(self._reader.samples_per_shard[shard]) if isinstance(error, FileError) else (row,)
            with self._lock:
                self._reasons |= {(shard, bad): str(error) for bad in rows if (shard, bad) not in self._reasons}
                num_bad = len(self._reasons)
            if num_bad <= self._max_bad_samples:
                return None
            if self._max_bad_samples == 0:
                raise
            raise ValueError(
                f"more than data.max_bad_samples {self._max_bad_samples} samples cannot be read, the last one: {error}"
            ) from error

    def _next(self, shard: int, row: int) -> tuple[int, int]:
        sizes = self._reader.samples_per_shard
        row += 1
        while row >= sizes[shard]:
            shard, row = (shard + 1) % len(sizes), 0
        return shard, row
