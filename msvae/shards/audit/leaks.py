"""Check that the splits of a dataset share no pixels: neither the same pixels of an image nor identical tiles."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from msvae.messages import counted
from msvae.shards.manifest import Manifest, ShardIndex
from msvae.shards.stores.store import Store

Window = tuple[int, int, int, int]
"""First row, first column, height, width in pixels."""
ByteRange = tuple[Store, str, int, int]
"""Store and name of a tar, byte offset, and number of bytes."""


@dataclass
class _Samples:
    """All samples of all splits, as columns."""

    splits: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    crc32c: list[int] = field(default_factory=list)
    members: list[tuple[ByteRange, ByteRange]] = field(default_factory=list)
    """Byte ranges of tile and mask of each sample."""
    windows: dict[str, list[tuple[int, Window]]] = field(default_factory=lambda: defaultdict(list))
    """Indices of samples and their windows, by image."""

    def name(self, sample: int) -> str:
        return f"{self.keys[sample]} ({self.splits[sample]})"


def check_leaks(splits: Mapping[str, Store]) -> list[str]:
    """Check that no pixel of an image and no whole tile is in two splits.

    Windows of images are compared by the `source` and `window` in the JSON of samples. Whole tiles are compared by
    checksum, and by their bytes if checksums are equal.

    Returns: a line for each split that holds a tile more than once.
    Raises: ValueError with two keys if two splits share a pixel or a tile.
    """
    samples = _read(splits)
    for image, windows in samples.windows.items():
        pair = _overlap(samples, windows)
        if pair is not None:
            first, second = (samples.name(sample) for sample in sorted(pair))
            raise ValueError(
                f"{first} and {second} hold the same pixels of {image}, so training data would be used for testing; "
                "split by whole images or with a gap, and pack again"
            )
    return list(_duplicates(samples))


def _read(splits: Mapping[str, Store]) -> _Samples:
    samples = _Samples()
    for split, store in splits.items():
        for shard in Manifest.load(store).shards:
            index = ShardIndex.load(store, shard)
            first = len(samples.keys)
            samples.keys += index.keys
            samples.splits += [split] * len(index.keys)
            samples.crc32c += index.crc32c
            bands = [(store, shard.name, *at) for at in zip(index.bands_offset, index.bands_bytes, strict=True)]
            masks = [(store, shard.name, *at) for at in zip(index.mask_offset, index.mask_bytes, strict=True)]
            samples.members += zip(bands, masks, strict=True)
            json_ranges = zip(index.json_offset, index.json_bytes, strict=True)
            for row, (key, at) in enumerate(zip(index.keys, json_ranges, strict=True)):
                json_object = json.loads(store.read_span(shard.name, *at) or b"{}")
                if isinstance(json_object, dict) and _is_window(json_object.get("source"), json_object.get("window")):
                    # the start of the key distinguishes images of one name in two folders
                    image = f"{', '.join(json_object['source'])} ({key.rsplit('_r', 1)[0]})"
                    samples.windows[image].append((first + row, tuple(json_object["window"])))
    return samples


def _is_window(source: Any, window: Any) -> bool:
    return (
        isinstance(source, list)
        and all(isinstance(name, str) for name in source)
        and isinstance(window, list)
        and len(window) == 4
        and all(isinstance(number, int) for number in window)
    )


def _overlap(samples: _Samples, windows: list[tuple[int, Window]]) -> tuple[int, int] | None:
    """Return two samples of different splits whose windows of one image share pixels, or None."""
    splits = np.array([samples.splits[sample] for sample, _ in windows])
    rects = np.array([window for _, window in windows])
    for split in np.unique(splits)[1:]:
        members, others = np.flatnonzero(splits == split), np.flatnonzero(splits < split)
        reach_px = rects[:, 2:].max()
        near = cKDTree(rects[others, :2]).query_ball_point(rects[members, :2], reach_px, p=np.inf)
        for member, candidates in zip(members, near, strict=True):
            for other in others[candidates]:
                if _share_pixels(rects[member], rects[other]):
                    return windows[other][0], windows[member][0]
    return None


def _share_pixels(first: NDArray[np.int64], second: NDArray[np.int64]) -> bool:
    begin, end = np.maximum(first[:2], second[:2]), np.minimum(first[:2] + first[2:], second[:2] + second[2:])
    return bool((begin < end).all())


def _duplicates(samples: _Samples) -> Iterator[str]:
    """Yield a line for each split that holds a tile more than once. If checksums are equal, the bytes are compared."""
    checksums = np.array(samples.crc32c)
    order = np.argsort(checksums, kind="stable")
    starts = np.flatnonzero(np.diff(checksums[order], prepend=-1))
    counts: dict[str, int] = defaultdict(int)
    example: dict[str, str] = {}
    runs = [run for run in np.split(order, starts[1:]) if len(run) > 1]
    for run in sorted(runs, key=lambda run: int(run[0])):
        by_content: dict[bytes, int] = {}
        for sample in map(int, run):
            content = b"".join(_content(member) for member in samples.members[sample])
            first = by_content.setdefault(content, sample)
            if samples.splits[first] != samples.splits[sample]:
                raise ValueError(
                    f"{samples.name(first)} and {samples.name(sample)} are the same tile, byte for byte, so "
                    "training data would be used for testing; name each image once, or group copies with --group-by, "
                    "and pack again"
                )
            if first != sample:
                counts[samples.splits[sample]] += 1
                example.setdefault(samples.splits[sample], f"{samples.keys[first]} and {samples.keys[sample]}")
    for split, count in counts.items():
        tiles = f"{counted(count, 'tile')} {'is' if count == 1 else 'are'}"
        yield f"{tiles} in {split} more than once, such as {example[split]}"


def _content(byte_range: ByteRange) -> bytes:
    store, name, offset, num_bytes = byte_range
    return store.read_span(name, offset, num_bytes)
