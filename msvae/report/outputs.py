"""The files of a report, which replace those of an earlier one together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_files(out: Path, last: str) -> Iterator[Path]:
    """A folder whose files replace those in `out`, `last` after all others; nothing changes when the block fails."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
        new = Path(folder)
        yield new
        files = [path.relative_to(new) for path in sorted(new.rglob("*")) if path.is_file()]
        for file in sorted(files, key=lambda file: file == Path(last)):
            (out / file).parent.mkdir(exist_ok=True)
            (new / file).replace(out / file)
