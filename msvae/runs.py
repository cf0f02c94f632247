"""Files of one JSON object a line, which a resumed run goes on with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"
RUN_CARD = "run_card.json"


class JsonLines:
    """A file of one JSON object a line, each with its `step`; lines after `last_step` are dropped."""

    def __init__(self, path: Path, last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = whole_lines(path) if path.is_file() else []
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= last_step))
        partial.rename(path)
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object; numbers that are not finite, which JSON does not know, become null."""
        self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def whole_lines(path: Path) -> list[str]:
    """Whole lines; a kill can leave half of the last one."""
    return [line for line in path.read_text().split("\n")[:-1] if line]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
