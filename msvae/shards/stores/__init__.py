"""Stores of shards: a folder, or a URL of an object store or web server."""

from __future__ import annotations

import os
from pathlib import Path

from msvae.shards.stores.local import LocalStore
from msvae.shards.stores.remote import RemoteStore, RetryPolicy
from msvae.shards.stores.store import Store


def open_store(location: str | Path, retry: RetryPolicy | None = None) -> Store:
    """Return the store at a folder, `file://`, `s3://`, `gs://`, `az://`, `http://` or `https://`.

    Credentials and endpoints come from the environment, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.

    Args:
        location: folder or URL.
        retry: how often and how long requests to a URL are repeated; ignored for a folder.
    Raises: ValueError if the URL has an unknown scheme or contains credentials.
    """
    text = os.fspath(location).removeprefix("file://")
    return RemoteStore(text, retry or RetryPolicy()) if "://" in text else LocalStore(Path(text))
