"""Credentials come from the environment or the machine's role, and stay there: never in a URL, a file or a message."""

from __future__ import annotations

import os
import re

IN_URL = re.compile(r"(?<=://)(?:[^/?#\s'\"]*|[^/?#:\s'\"]*:(?!\d+/)[^?#\s'\"]*)@")
"""What stands before the host: `user:password@`, where a password may hold a slash, which is no URL then."""
QUERY = re.compile(r"://[^?\s]*\?")
"""Where signatures stand."""
NAMES = re.compile(r"(KEY|KEY_ID|SECRET|TOKEN|PASSWORD|SIGNATURE)$")
"""Of environment variables that hold credentials."""
SHORTEST = 8
"""Characters of a value that is worth hiding; a shorter one is found in many words."""


def refuse_in_url(text: str) -> None:
    """See that a URL holds no credentials; other texts pass.

    Raises: ValueError that names it without them.
    """
    if IN_URL.search(text) or QUERY.search(text):
        named = IN_URL.sub("…@", text).partition("?")[0]
        raise ValueError(
            f"the URL {named} holds credentials or a query, which would come into logs and checkpoints; "
            "give it without, and credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def hidden(text: str) -> str:
    """A text from elsewhere without the credentials in its URLs and those of the environment."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, f"${name}")
    return IN_URL.sub("…@", text)
