"""The splits of a data set: the one at a place, or train/, val/ and test/ inside it."""

from __future__ import annotations

from pathlib import Path

from msvae.shards.manifest import MANIFEST_NAME
from msvae.shards.stores.opening import open_store
from msvae.shards.stores.store import MissingError, Store

SPLITS = ("train", "val", "test")


def find_splits(location: str | Path, *, holds: str = MANIFEST_NAME) -> dict[str, Store]:
    """Stores of the splits that hold a file `holds` or with that ending, by name: train, val, test, or one alone.

    Raises: ValueError when there is none.
    """
    alone = open_store(location)
    if _holds(alone, holds):
        return {_name(alone.location): alone}
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


def splits_to_make(location: str | Path) -> dict[str, Store]:
    """Stores of the splits by the names that what is made of them has: train for one alone that is no val or test.

    Raises: ValueError when there is none.
    """
    return {name if name in SPLITS else SPLITS[0]: store for name, store in find_splits(location).items()}


def _name(location: str) -> str:
    """The last part of a folder or URL; of `.` and `..` the name of the folder that is meant."""
    path = Path(location)
    return path.resolve().name if path.name in ("", "..") else path.name


def _holds(store: Store, name: str) -> bool:
    try:
        if name.startswith("."):
            return any(file.endswith(name) for file in store.names())
        return store.size_bytes(name) > 0
    except MissingError:
        return False
