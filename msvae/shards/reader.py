"""Random access to the samples of a split: positioned reads straight into the caller's arrays."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from msvae.shards import mask_png
from msvae.shards.cache import SpanCache
from msvae.shards.manifest import Manifest, ShardEntry, ShardIndex
from msvae.shards.sample_codec import decompress_into, npy_header
from msvae.shards.stores.opening import open_store
from msvae.shards.stores.remote import Patience
from msvae.shards.stores.store import FileError

MAX_OPEN_INDEXES = 256
MAX_EXTRA_BYTES = 2**20
"""What a sample may hold beside its tile: tar headers, mask, JSON between them."""


class ShardReader:
    """The samples of one split, in a folder or at a URL. Safe to use from several threads at once."""

    def __init__(self, location: str | Path, cache: SpanCache | None = None, patience: Patience | None = None) -> None:
        self.store = open_store(location, patience)
        self.manifest = Manifest.load(self.store)
        self.tile_shape = (len(self.manifest.bands), self.manifest.tile_px, self.manifest.tile_px)
        self.dtype = np.dtype(self.manifest.dtype)
        self._npy_header = npy_header(self.tile_shape, self.dtype)
        self._tile_bytes = int(np.prod(self.tile_shape)) * self.dtype.itemsize
        self._cache = cache
        self._indexes: OrderedDict[int, Future[ShardIndex | str]] = OrderedDict()
        """Or why there is none."""
        self._lock = threading.Lock()

    @property
    def samples_per_shard(self) -> list[int]:
        """Number of samples in each shard, in manifest order."""
        return self.manifest.shards.num_samples

    def key(self, shard: int, row: int) -> str:
        """The key of one sample."""
        return self._index(shard).keys[row]

    def read_into(self, shard: int, row: int, tile: NDArray[Any], leaf_mask: NDArray[np.bool_]) -> str:
        """Read one sample into `tile` (C, H, W), stored type, and `leaf_mask` (H, W); returns its key.

        Raises: ValueError naming shard and key when bytes are missing, altered, or not what the manifest says.
        """
        return self._read_into(shard, row, tile, leaf_mask)[0]

    def _read_into(self, shard: int, row: int, tile: NDArray[Any], leaf_mask: NDArray[np.bool_]) -> tuple[str, bytes]:
        """Key and mask member."""
        entry, index = self.manifest.shards[shard], self._index(shard)
        place = f"{self.store.path(entry.name)}: sample {index.keys[row]}"
        span = _Span.of(index, row)
        if span.num_bytes > self._tile_bytes + MAX_EXTRA_BYTES:
            raise ValueError(f"{place} takes {span.num_bytes} bytes, too many for its tile; pack this split again")
        compressed = self.manifest.compression != "none"
        if not compressed and index.bands_bytes[row] != len(self._npy_header) + tile.nbytes:
            raise ValueError(
                f"{place} holds {index.bands_bytes[row]} bytes, expected {len(self._npy_header) + tile.nbytes} "
                f"for {self.dtype} tiles of shape {self.tile_shape}; pack this split again"
            )
        head = bytearray(index.bands_bytes[row] if compressed else len(self._npy_header))
        bands = [memoryview(head)] if compressed else [memoryview(head), tile.data.cast("B")]
        png = self._fetch(entry, index, row, span, bands, place)
        if compressed:
            _decompress(head, tile, place)
        elif head != self._npy_header:
            raise ValueError(f"{place} is not a {self.dtype} array of shape {self.tile_shape}; pack this split again")
        _decode_mask(png, leaf_mask, place)
        return index.keys[row], png

    def members(self, shard: int, row: int) -> dict[str, str | bytes]:
        """One sample in webdataset's form: `__key__`, `__url__`, and the bytes of `bands.npy`, `mask.png`, `json`.

        Raises: ValueError like `read_into`.
        """
        tile, leaf_mask = np.empty(self.tile_shape, self.dtype), np.empty(self.tile_shape[1:], np.bool_)
        key, png = self._read_into(shard, row, tile, leaf_mask)
        about = self.about(shard, row)
        return {
            "__key__": key,
            "__url__": self.store.path(self.manifest.shards[shard].name),
            "bands.npy": self._npy_header + tile.tobytes(),
            "mask.png": png,
            **({"json": about} if about else {}),
        }

    def about(self, shard: int, row: int) -> bytes:
        """The JSON of one sample, empty for one without. Indexes made before JSON had checksums leave it unchecked.

        Raises: ValueError naming shard and key when it is missing or altered.
        """
        entry, index = self.manifest.shards[shard], self._index(shard)
        content = bytearray(index.json_bytes[row])
        if content:
            place = f"{self.store.path(entry.name)}: the JSON of sample {index.keys[row]}"
            expected = None if index.json_crc32c is None else index.json_crc32c[row]
            self._fill(entry, index.json_offset[row], [memoryview(content)], lambda: crc32c(content), expected, place)
        return bytes(content)

    def _fetch(
        self, entry: ShardEntry, index: ShardIndex, row: int, span: _Span, bands: list[memoryview], place: str
    ) -> bytes:
        """Fill the buffers of the bands member; returns the mask member. From the cache where it has them."""
        before, after = bytearray(span.before_bands), bytearray(span.after_bands)
        buffers = [part for part in (memoryview(before), *bands, memoryview(after)) if part]

        def png() -> bytes:
            around, start = (before, span.mask_start) if span.mask_first else (after, span.mask_start)
            return bytes(around[start : start + index.mask_bytes[row]])

        def checksum() -> int:
            crc = 0
            for part in (*bands, png()):
                crc = crc32c(part, crc)
            return crc

        self._fill(entry, span.offset, buffers, checksum, index.crc32c[row], place)
        return png()

    def _fill(
        self,
        entry: ShardEntry,
        offset: int,
        buffers: list[memoryview],
        checksum: Callable[[], int],
        expected: int | None,
        place: str,
    ) -> None:
        """Read from the cache where it has these bytes, else from the store. None expects no checksum."""
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
                f"{place} is truncated or altered: {what}"
                + ("" if expected is None else f", the index expects checksum {expected:08x}")
                + "; restore the shard from its source or pack this split again"
            )
        if cache is not None:
            cache.write(entry, offset, buffers)

    def _index(self, shard: int) -> ShardIndex:
        """Opened by the first thread that asks for it; those that ask for others do not wait. A failure stays one."""
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
                opened.set_result(self._open(self.manifest.shards[shard]))
            except FileError as error:
                opened.set_result(str(error))
            except BaseException as error:
                opened.set_exception(error)
        index = opened.result()
        if isinstance(index, str):  # an exception that is kept would keep the tiles of those who saw it
            raise FileError(index)
        return index

    def _open(self, entry: ShardEntry) -> ShardIndex:
        """The index of a shard; what is wrong with it is wrong with the whole shard."""
        try:
            return ShardIndex.load(self.store, entry)
        except FileError:
            raise
        except ValueError as error:
            raise FileError(str(error)) from error


class _Span(NamedTuple):
    """The bytes of a sample from its first to its last member, the JSON left out unless it lies between."""

    offset: int
    before_bands: int
    after_bands: int
    mask_first: bool
    mask_start: int
    """In what stands before the bands member, or after it."""
    num_bytes: int

    @classmethod
    def of(cls, index: ShardIndex, row: int) -> _Span:
        bands, mask = index.bands_offset[row], index.mask_offset[row]
        bands_end, mask_end = bands + index.bands_bytes[row], mask + index.mask_bytes[row]
        offset, end = min(bands, mask), max(bands_end, mask_end)
        mask_first = mask < bands
        mask_start = 0 if mask_first else mask - bands_end
        return cls(offset, bands - offset, end - bands_end, mask_first, mask_start, end - offset)


def _decompress(chunk: bytearray, tile: NDArray[Any], place: str) -> None:
    try:
        decompress_into(chunk, tile)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; pack this split again") from error


def _decode_mask(png: bytes, leaf_mask: NDArray[np.bool_], place: str) -> None:
    try:
        mask_png.decode_into(png, leaf_mask)
    except ValueError as error:
        raise ValueError(f"{place} {error}; pack this split again") from error
