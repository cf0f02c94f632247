"""Protection of credentials.

Credentials come from the environment or the role of the machine. They never appear in a URL, a file or a message.
"""

from __future__ import annotations

import os
import re

URL_USER = re.compile(r"(?<=://)(?:[^/?#\s'\"]*|[^/?#:\s'\"]*:(?!\d+/)[^?#\s'\"]*)@")
"""`user:password@` before the host. A password with a slash is matched as well, although this is not a valid URL."""
QUERY = re.compile(r"://[^?\s]*\?")
"""A URL with a query, which may hold a signature."""
SECRET_NAMES = re.compile(r"(KEY|KEY_ID|SECRET|TOKEN|PASSWORD|SIGNATURE)$")
"""Names of environment variables that hold credentials."""
MIN_SECRET_CHARS = 8
"""Length of the shortest value that is hidden; a shorter one would match parts of many words."""


def check_no_credentials(text: str) -> None:
    """Check that a URL contains no credentials. Any other text passes the check.

    Raises: ValueError if the URL contains credentials. The message shows the URL without them.
    """
    if URL_USER.search(text) or QUERY.search(text):
        shown = URL_USER.sub("…@", text).partition("?")[0]
        raise ValueError(
            f"the URL {shown} holds credentials or a query, which would appear in logs and checkpoints; "
            "remove them and set environment variables such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def hide_credentials(text: str) -> str:
    """Return the text without credentials in its URLs and without values of secret environment variables."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= MIN_SECRET_CHARS:
            text = text.replace(value, f"${name}")
    return URL_USER.sub("…@", text)
