"""Folders of tars that others wrote: what lies there, and where manifest and indexes go."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from msvae.shards.manifest import MANIFEST_NAME, Manifest
from msvae.shards.splits import SPLITS, find_splits
from msvae.shards.stores.opening import open_store
from msvae.shards.stores.store import MissingError, Store

UNPACK = {".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tar.xz": "unxz", ".tar.zst": "unzstd"}
"""What makes of each a tar that can be read at random."""


def existing_manifest(stores: dict[str, Store], overwrite: bool) -> Manifest | None:
    """The manifest that lies there already.

    Raises: ValueError when there is one and it may not be replaced.
    """
    manifests = [store for store in stores.values() if MANIFEST_NAME in store.names()]
    if manifests and not overwrite:
        raise ValueError(
            f"{manifests[0].location} has a {MANIFEST_NAME}; check it with `msvae verify`, or give --overwrite to "
            "take the tars as they are now"
        )
    return Manifest.load(manifests[0]) if manifests else None


def tar_stores(location: str) -> dict[str, Store]:
    """Stores of the splits with tars, by name.

    Raises: ValueError when there is none, or when a tar beside others is compressed, and would be left out.
    """
    inside = [f"{location.rstrip('/')}/{name}" for name in SPLITS]
    try:
        stores = find_splits(location, holds=".tar")
    except ValueError:
        _refuse_compressed([location, *inside])
        raise
    alone = any(store.location.rstrip("/") == location.rstrip("/") for store in stores.values())
    _refuse_compressed([location] if alone else inside)
    return stores


def _refuse_compressed(places: Sequence[str]) -> None:
    for place in places:
        names: Sequence[str] = ()
        with suppress(MissingError):
            names = open_store(place).names()
        for name in names:
            for ending, unpack in UNPACK.items():
                if name.endswith(ending):
                    how = f"`{unpack}`" if "://" in place else f"`{unpack} {place}/*{ending}`"
                    raise ValueError(
                        f"{place} holds {name}, a compressed tar, of which no part can be read alone; unpack it with "
                        f"{how}"
                    )


def tar_names(store: Store) -> list[str]:
    """Names of the tars of a split, sorted."""
    return sorted(name for name in store.names() if name.endswith(".tar"))


def output_folder(store: Store, name: str, out: Path | None, overwrite: bool) -> Path:
    """Where manifest and indexes of a split go.

    Raises: ValueError when nothing can or may be written there.
    """
    if out is None and "://" in store.location:
        raise ValueError(
            f"{store.location} is not written to; give --out FOLDER, and copy what it holds beside the tars"
        )
    folder = Path(store.location) if out is None else out / name
    if not overwrite and (folder / MANIFEST_NAME).exists():
        raise ValueError(f"{folder} has a {MANIFEST_NAME}; give --overwrite to replace it, or another --out")
    return folder
