"""The splits of a data set: the one at a place, or train/, val/ and test/ inside it."""

from __future__ import annotations

from pathlib import Path

from msvae.shards.manifest import MANIFEST_NAME
from msvae.shards.store import MissingError, Store, open_store

SPLITS = ("train", "val", "test")


def find_splits(location: str | Path, *, holds: str = MANIFEST_NAME) -> dict[str, Store]:
    """Stores of the splits that hold a file `holds` or with that ending, by name: train, val, test, or one alone.

    Raises: ValueError when there is none.
    """
    alone = open_store(location)
    if _holds(alone, holds):
        return {Path(alone.location).name: alone}
    found = {}
    for name in SPLITS:
        store = open_store(f"{str(location).rstrip('/')}/{name}")
        if _holds(store, holds):
            found[name] = store
    if not found:
        what = f"a {holds}" if holds == MANIFEST_NAME else f"{holds} files"
        raise ValueError(
            f"neither {location} nor {', '.join(SPLITS)} inside it holds {what}; make shards with `msvae pack`, or "
            "index tars of others with `msvae index`"
        )
    return found


def _holds(store: Store, name: str) -> bool:
    try:
        if name.startswith("."):
            return any(file.endswith(name) for file in store.names())
        return store.size_bytes(name) > 0
    except MissingError:
        return False
