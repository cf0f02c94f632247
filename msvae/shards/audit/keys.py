"""Whether keys are unique over a split, at eight bytes a key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray


class KeyRegister:
    """Keys of all shards as 64-bit hashes; names are asked for again only where hashes agree."""

    def __init__(self) -> None:
        self._hashes: list[NDArray[np.uint64]] = []
        self._shards: list[int] = []

    def add(self, shard: int, keys: Iterable[str]) -> None:
        """Note the keys of one shard."""
        digests = (hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest() for key in keys)
        self._hashes.append(np.frombuffer(b"".join(digests), np.uint64))
        self._shards.append(shard)

    def repeated(self, keys_of: Callable[[int], Iterable[str]]) -> Iterator[tuple[str, list[int]]]:
        """Keys that stand more than once, each with its shards; `keys_of` gives the keys of a shard again."""
        if not self._hashes:
            return
        hashes = np.concatenate(self._hashes)
        values, counts = np.unique(hashes, return_counts=True)
        suspects = values[counts > 1]
        if not len(suspects):
            return
        places: dict[str, list[int]] = {}
        for shard, own in zip(self._shards, self._hashes, strict=True):
            if np.isin(own, suspects).any():
                for key in keys_of(shard):
                    places.setdefault(key, []).append(shard)
        yield from ((key, shards) for key, shards in places.items() if len(shards) > 1)
