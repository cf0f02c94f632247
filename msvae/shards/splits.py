"""The splits of a data set: the one at a place, or train/, val/ and test/ inside it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from msvae.shards.manifest import MANIFEST_NAME, Manifest
from msvae.shards.store import Store, open_store

SPLITS = ("train", "val", "test")
RecordT = TypeVar("RecordT", bound=BaseModel)


def find_splits(location: str | Path, *, holds: str = MANIFEST_NAME) -> dict[str, Store]:
    """Stores of the splits that hold a file `holds` or with that ending, by name: train, val, test, or one alone.

    Raises: ValueError when there is none.
    """
    alone = open_store(location)
    if _holds(alone, holds):
        return {Path(alone.location).name: alone}
    found = {}
    for name in SPLITS:
        try:
            store = open_store(f"{str(location).rstrip('/')}/{name}")
        except ValueError:
            continue
        if _holds(store, holds):
            found[name] = store
    if not found:
        what = f"a {holds}" if holds == MANIFEST_NAME else f"{holds} files"
        raise ValueError(
            f"neither {location} nor {', '.join(SPLITS)} inside it holds {what}; make shards with `msvae pack`, or "
            "index tars of others with `msvae index`"
        )
    return found


def load_manifest(store: Store) -> Manifest:
    """The manifest of a split.

    Raises: ValueError when it is missing, or is no manifest.
    """
    return parse(Manifest, store, MANIFEST_NAME, store.read(MANIFEST_NAME))


def parse(record: type[RecordT], store: Store, name: str, content: bytes) -> RecordT:
    """A record out of the JSON in a file.

    Raises: ValueError, one line, naming the file and the field.
    """
    try:
        return record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{store.location}/{name}: {place}: {first['msg']}; restore it, or make it again") from error


def _holds(store: Store, name: str) -> bool:
    if name.startswith("."):
        return any(file.endswith(name) for file in store.names())
    try:
        return store.size_bytes(name) > 0
    except ValueError:
        return False
