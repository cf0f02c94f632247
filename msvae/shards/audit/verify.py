"""Check a whole dataset. Every fault is recorded, and no fault ends the check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.bands import LeafStatistics
from msvae.messages import OnProgress, counted
from msvae.shards.audit.across_shards import ByteProgress, KeyRegister, in_order
from msvae.shards.audit.leaks import check_leaks
from msvae.shards.audit.verify_shard import Fault, ShardCheck, VerifiedShard
from msvae.shards.leaf_accumulators import LeafCounts
from msvae.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, ShardIndex, index_name
from msvae.shards.splits import SPLITS, find_splits
from msvae.shards.stores import open_store
from msvae.shards.stores.store import Store

RELATIVE_TOLERANCE = 1e-6
"""Tolerance for statistics, which are sums of many numbers in an order that may differ."""
AGAIN = "make this split again with `msvae pack` or `msvae index`"
SHARED_FIELDS = ("band_names", "wavelengths_nm", "dtype", "tile_px", "scale", "offset", "statistics")

OnFault = Callable[[Fault], None]


@dataclass
class VerifiedSplit:
    """Content of a split, summed over its shards."""

    leaf: LeafCounts
    num_shards: int = 0
    num_samples: int = 0
    """Number of valid samples."""
    num_bytes: int = 0
    nonfinite_background: int = 0


@dataclass
class Verification:
    """Content of all splits, and all faults."""

    splits: dict[str, VerifiedSplit] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def verify_dataset(
    location: str, *, num_threads: int, on_fault: OnFault | None = None, on_progress: OnProgress | None = None
) -> Verification:
    """Read and check every byte of a dataset or of one split.

    Args:
        location: folder or URL.
        num_threads: number of shards that are read at once.
        on_fault: called with each fault when it is found.
        on_progress: called with bytes done and total.
    Raises: ValueError if there is no dataset.
    """
    found = Verification()

    def note(fault: Fault) -> None:
        found.faults.append(fault)
        if on_fault is not None:
            on_fault(fault)

    stores, manifests = find_splits(location), {}
    for fault in _missing_manifests(location, stores):
        note(fault)
    for name, store in stores.items():
        try:
            manifests[name] = Manifest.load(store)
        except ValueError as error:
            note(_manifest_fault(store, str(error)))
    progress = ByteProgress(sum(sum(manifest.shards.size_bytes) for manifest in manifests.values()), on_progress)
    for name, manifest in manifests.items():
        found.splits[name] = _verify_split(name, stores[name], manifest, num_threads, progress, note)
    for fault in _differing_manifests(stores, manifests):
        note(fault)
    if len(manifests) > 1 and not found.faults:
        for fault in _leaks(stores, manifests):
            note(fault)
    return found


def _verify_split(
    name: str, store: Store, manifest: Manifest, num_threads: int, progress: ByteProgress, note: OnFault
) -> VerifiedSplit:
    split, register = VerifiedSplit(LeafCounts(manifest.dtype, manifest.scale, manifest.offset)), KeyRegister()
    num_threads = split.leaf.threads_that_fit(num_threads)
    for fault in _unlisted_tars(store, manifest):
        note(fault)

    def check(shard: ShardEntry) -> VerifiedShard:
        return ShardCheck(store, manifest, shard, progress.add).run()

    for number, shard in enumerate(in_order(check, manifest.shards, num_threads)):
        for fault in shard.faults:
            note(fault)
        register.add(number, shard.keys)
        split.leaf.join(shard.leaf)
        split.num_shards += 1
        split.num_samples += shard.num_samples
        split.num_bytes += shard.num_bytes
        split.nonfinite_background += shard.nonfinite_background
    for fault in _repeated_keys(store, manifest, register):
        note(fault)
    # the manifest holds statistics of the training split; they cannot match if samples are damaged
    if name not in SPLITS[1:] and split.num_samples == manifest.num_samples:
        for message in _statistics_faults(manifest.statistics, split.leaf):
            note(_manifest_fault(store, f"{message}; {AGAIN}"))
    return split


def _missing_manifests(location: str, stores: dict[str, Store]) -> Iterator[Fault]:
    """Yield a fault for each split that holds tars but no manifest."""
    for name in SPLITS if set(stores) & set(SPLITS) else ():
        store = open_store(f"{location.rstrip('/')}/{name}")
        try:
            if name not in stores and any(file.endswith(".tar") for file in store.names()):
                yield _manifest_fault(store, f"is missing, but there are tars; restore it, or {AGAIN}")
        except ValueError:
            continue  # no such split, or a server that does not list its files


def _unlisted_tars(store: Store, manifest: Manifest) -> Iterator[Fault]:
    """Yield a fault for each tar that the manifest does not list, and one if it lists no samples."""
    listed = manifest.shards.name
    if not manifest.num_samples:
        yield _manifest_fault(store, f"lists no samples; {AGAIN}")
    try:
        present = store.names()
    except ValueError:
        return  # some servers do not list their files
    for unlisted in sorted({file for file in present if file.endswith(".tar")} - set(listed)):
        yield Fault(
            f"{store.location}/{unlisted}", f"is not in the manifest, so training ignores it; move it, or {AGAIN}"
        )


def _repeated_keys(store: Store, manifest: Manifest, register: KeyRegister) -> Iterator[Fault]:
    def keys_of(shard: int) -> list[str]:
        return ShardIndex.model_validate_json(store.read(index_name(manifest.shards.name[shard]))).keys

    for key, shards in register.repeated(keys_of):
        names = sorted({manifest.shards.name[shard] for shard in shards})
        yield Fault(
            f"{store.location}/{names[0]}",
            f"sample {key} is not unique: it occurs {len(shards)} times, in {', '.join(names)}; give each sample a "
            "unique key and make this split again",
        )


def _statistics_faults(stated: LeafStatistics, leaf: LeafCounts) -> Iterator[str]:
    try:
        measured = leaf.statistics()
    except ValueError as error:
        yield f"statistics cannot be measured: {error}"
        return
    if stated.num_pixels != measured.num_pixels:
        yield f"statistics are of {counted(stated.num_pixels, 'leaf pixel')}, the tiles have {measured.num_pixels:,}"
    if stated.coverage_histogram and stated.coverage_histogram != measured.coverage_histogram:
        yield f"coverage_histogram is {stated.coverage_histogram}, the masks have {measured.coverage_histogram}"
    for name in ("mean", "std", "minimum", "maximum", "covariance", "percentiles"):
        expected, got = (_as_array(getattr(statistics, name)) for statistics in (stated, measured))
        absolute = RELATIVE_TOLERANCE * float(np.abs(got).max())
        if expected.shape != got.shape or not np.allclose(expected, got, RELATIVE_TOLERANCE, absolute):
            yield f"{name} of the statistics is {_short(expected)}, the leaf pixels have {_short(got)}"


def _as_array(values: list[Any] | dict[str, list[float]]) -> NDArray[np.float64]:
    return np.array(list(values.values()) if isinstance(values, dict) else values)


def _leaks(stores: dict[str, Store], manifests: dict[str, Manifest]) -> Iterator[Fault]:
    """Yield a fault if two splits share tiles or pixels. Called for valid splits only, because it must read them."""
    try:
        check_leaks({name: stores[name] for name in manifests})
    except ValueError as error:
        yield Fault(str(Path(stores[next(iter(manifests))].location).parent), str(error))


def _differing_manifests(stores: dict[str, Store], manifests: dict[str, Manifest]) -> Iterator[Fault]:
    if not manifests:
        return
    first = next(iter(manifests))
    for name, manifest in manifests.items():
        different = [f for f in SHARED_FIELDS if getattr(manifest, f) != getattr(manifests[first], f)]
        if different:
            yield _manifest_fault(
                stores[name],
                f"differs from that of {first} in {', '.join(different)}; make both splits again together",
            )


def _manifest_fault(store: Store, message: str) -> Fault:
    file = f"{store.location}/{MANIFEST_NAME}"
    return Fault(file, message.removeprefix(f"{file}: "))


def _short(values: np.ndarray) -> str:
    return np.array2string(np.diag(values) if values.ndim == 2 else values, precision=6, separator=", ")
