"""From a folder or URL to its store."""

from __future__ import annotations

import os
from pathlib import Path

from msvae.shards.stores.local import LocalStore
from msvae.shards.stores.remote import Patience, RemoteStore
from msvae.shards.stores.store import Store


def open_store(location: str | Path, patience: Patience | None = None) -> Store:
    """The store at a folder, `file://`, `s3://`, `gs://`, `az://`, `http://` or `https://`.

    Credentials and endpoints come from the environment, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.
    Raises: ValueError for a URL that is not understood, or that holds credentials.
    """
    text = os.fspath(location)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemoteStore(text, patience or Patience()) if "://" in text else LocalStore(Path(text))
