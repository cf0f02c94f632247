"""Folders of tars that others wrote: what lies there, and where manifest and indexes go."""

from __future__ import annotations

from pathlib import Path

from msvae.shards.manifest import MANIFEST_NAME, Manifest
from msvae.shards.stores.store import Store


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
