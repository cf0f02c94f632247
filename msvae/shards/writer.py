"""Write samples into a tar that plain WebDataset reads. Its bytes depend on the content alone."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from msvae.files import partial_path, write_text
from msvae.shards.manifest import COLUMNS, ShardEntry, ShardIndex, index_name
from msvae.shards.sample_codec import ENDINGS, Compression, encode_mask, encode_tile

MAX_KEY_CHARS = 80
"""Limit of a key. A USTAR name has 100 bytes, and the longest ending of a member needs 13."""


class ShardWriter:
    """Writes one tar sample by sample. Leaving the `with` block moves the tar into place, then writes its index.

    Members of a sample: `KEY.bands.npy` or `KEY.bands.blosc2` (C, H, W), `KEY.mask.png` (1 bit), `KEY.json`. Their
    headers have 0 as time and owner. Tar and index are written under temporary names, so a shard with an index is
    complete, even if a process was killed.
    """

    def __init__(self, path: Path, compression: Compression = "none") -> None:
        self.path = path
        self._compression: Compression = compression
        self.entry: ShardEntry | None = None
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._partial = partial_path(path)
        self._tar = self._partial.open("wb", buffering=0)
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                end = 2 * tarfile.BLOCKSIZE
                self._append(bytes(end + -(self._size_bytes + end) % tarfile.RECORDSIZE))
                self._tar.close()
                self.entry = self._finish()
        finally:
            self._tar.close()
            self._partial.unlink(missing_ok=True)

    @property
    def num_samples(self) -> int:
        """Number of samples written so far."""
        return len(self._columns["keys"])

    def write(self, key: str, tile: NDArray[Any], leaf_mask: NDArray[np.bool_], json_object: dict[str, Any]) -> None:
        """Append one sample: tile (C, H, W), leaf mask (H, W), and the object for its JSON."""
        assert "." not in key and "/" not in key and len(key) <= MAX_KEY_CHARS, key
        assert tile.shape[1:] == leaf_mask.shape, (tile.shape, leaf_mask.shape)
        tile_member = ENDINGS[self._compression], encode_tile(tile, self._compression)
        self.append(key, tile_member, encode_mask(leaf_mask), _json_bytes(json_object))

    def append(self, key: str, array: tuple[str, bytes], mask: bytes, json_member: bytes) -> None:
        """Append one sample as the bytes of its members: array with its ending, mask, and JSON (may be empty)."""
        members = {"bands": array, "mask": ("mask.png", mask), "json": ("json", json_member)}
        if not json_member:
            del members["json"]
            self._columns["json_offset"].append(0)
            self._columns["json_bytes"].append(0)
        for name, (ending, content) in members.items():
            header = tarfile.TarInfo(f"{key}.{ending}")
            header.size = len(content)
            # the header is USTAR, unless a name is not ASCII or exceeds 100 characters, as names of latents may
            self._append(header.tobuf(tarfile.PAX_FORMAT))
            self._columns[f"{name}_offset"].append(self._size_bytes)
            self._columns[f"{name}_bytes"].append(len(content))
            self._append(content)
            self._append(bytes(-len(content) % tarfile.BLOCKSIZE))
        self._columns["keys"].append(key)
        self._columns["crc32c"].append(crc32c(mask, crc32c(array[1])))
        self._columns["json_crc32c"].append(crc32c(json_member))

    def _append(self, content: bytes) -> None:
        # an unbuffered file may write fewer bytes than requested
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[self._tar.write(remaining) :]
        self._sha256.update(content)
        self._size_bytes += len(content)

    def _finish(self) -> ShardEntry:
        index = ShardIndex(sha256=self._sha256.hexdigest(), **self._columns).model_dump_json() + "\n"
        self._partial.replace(self.path)
        write_text(self.path.parent / index_name(self.path.name), index)
        return ShardEntry(
            name=self.path.name,
            num_samples=self.num_samples,
            size_bytes=self._size_bytes,
            index_sha256=hashlib.sha256(index.encode()).hexdigest(),
        )


def is_complete(tar: Path) -> bool:
    """Return True if a shard was written completely: tar and index exist, and the index is written last."""
    return tar.is_file() and (tar.parent / index_name(tar.name)).is_file()


def shard_entry(tar: Path) -> ShardEntry:
    """Return the entry of a complete shard for the manifest."""
    index = (tar.parent / index_name(tar.name)).read_bytes()
    num_samples = len(ShardIndex.model_validate_json(index).keys)
    return ShardEntry(tar.name, num_samples, tar.stat().st_size, hashlib.sha256(index).hexdigest())


def _json_bytes(json_object: dict[str, Any]) -> bytes:
    """Return JSON with sorted keys. Raises: ValueError if a value is NaN or infinite."""
    return json.dumps(json_object, sort_keys=True, allow_nan=False).encode()
