"""Writing samples into a tar that plain WebDataset reads and whose bytes depend on its content alone."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from msvae.shards import mask_png
from msvae.shards.manifest import COLUMNS, ShardEntry, ShardIndex, index_name
from msvae.shards.tile_codec import ENDINGS, Compression, encode

MAX_KEY_CHARS = 80
"""A USTAR name has 100 bytes; the longest member ending takes 13."""


class ShardWriter:
    """One tar, written sample by sample; leaving the `with` block writes its index beside it.

    Members of a sample: `KEY.bands.npy` or `KEY.bands.blosc2` (C, H, W), `KEY.mask.png` (1 bit), `KEY.json`. Times and
    owners are 0.
    """

    def __init__(self, path: Path, compression: Compression = "none") -> None:
        self.path = path
        self._compression: Compression = compression
        self.entry: ShardEntry | None = None
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 closed in __exit__

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._tar.close()
        if kind is None:
            self.entry = self._write_index()

    @property
    def num_samples(self) -> int:
        """Samples written so far."""
        return len(self._columns["keys"])

    def write(self, key: str, tile: NDArray[Any], leaf_mask: NDArray[np.bool_], about: dict[str, Any]) -> None:
        """Append one sample: tile (C, H, W), leaf mask (H, W), and what is known about them."""
        assert "." not in key and "/" not in key and len(key) <= MAX_KEY_CHARS, key
        assert tile.shape[1:] == leaf_mask.shape, (tile.shape, leaf_mask.shape)
        members = {
            "bands": encode(tile, self._compression),
            "mask": mask_png.encode(leaf_mask),
            "json": json_bytes(about),
        }
        endings = (ENDINGS[self._compression], "mask.png", "json")
        for (name, content), ending in zip(members.items(), endings, strict=True):
            self._columns[f"{name}_offset"].append(self._tar.offset + tarfile.BLOCKSIZE)
            self._columns[f"{name}_bytes"].append(len(content))
            header = tarfile.TarInfo(f"{key}.{ending}")
            header.size = len(content)
            self._tar.addfile(header, io.BytesIO(content))
        self._columns["keys"].append(key)
        self._columns["crc32c"].append(crc32c(members["mask"], crc32c(members["bands"])))

    def _write_index(self) -> ShardEntry:
        with self.path.open("rb") as tar:
            digest = hashlib.file_digest(tar, "sha256").hexdigest()
        index = ShardIndex(sha256=digest, **self._columns).model_dump_json() + "\n"
        (self.path.parent / index_name(self.path.name)).write_text(index)
        return ShardEntry(
            name=self.path.name,
            num_samples=self.num_samples,
            size_bytes=self.path.stat().st_size,
            index_sha256=hashlib.sha256(index.encode()).hexdigest(),
        )


def json_bytes(about: dict[str, Any]) -> bytes:
    """JSON with sorted keys; NaN is refused."""
    return json.dumps(about, sort_keys=True, allow_nan=False).encode()
