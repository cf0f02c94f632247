"""Checkpoints on disk: tensors in safetensors, the rest in JSON, and checksums of both; whole or not there at all.

Everything random in a run is a function of (seed, step, sample), so no generator state needs keeping.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crc32c import crc32c
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msvae.files import move_folder
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.versions import library_versions

FOLDER, LATEST = "checkpoints", "latest"
TENSORS, STATE, CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"
READ_BYTES = 2**24


def write(out: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write `out/checkpoints/step-…` under a temporary name, rename it, point `latest` at it, and tidy up.

    Args: contiguous tensors on the CPU; `state["score"]`, the validation loss measured at this very step, or None.
    Keeps: the newest `keep`, and the one of the lowest score.
    """
    final = out / FOLDER / f"step-{step:08d}"
    for leftover in final.parent.glob(".*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    partial = final.with_name(f".{final.name}.partial")
    partial.mkdir(parents=True)
    try:
        save_file(dict(tensors), partial / TENSORS)
        (partial / STATE).write_text(
            json.dumps({"step": step, "versions": library_versions(), **state}, indent=1) + "\n"
        )
        sums = {name: _checksum(partial / name) for name in (TENSORS, STATE)}
        (partial / CHECKSUMS).write_text(json.dumps(sums) + "\n")
        move_folder(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    pointer = final.with_name(f".{LATEST}")
    pointer.write_text(f"{final.name}\n")
    pointer.rename(final.with_name(LATEST))
    for old in _superfluous(final, keep):
        shutil.rmtree(old)
    return final


def found(out: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, not looked into."""
    return sorted((out / FOLDER).glob("step-*"))


def newest_whole(out: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with those after it."""
    faults = []
    for path in reversed(found(out)):
        try:
            check(path)
        except ValueError as fault:
            faults.append(str(fault))
        else:
            return path, faults
    return None, faults


def check(path: Path) -> None:
    """Compare a checkpoint with its checksums.

    Raises: ValueError saying what is wrong.
    """
    if not all((path / name).is_file() for name in (TENSORS, STATE, CHECKSUMS)):
        raise ValueError(f"{path} is not a checkpoint: it lacks {TENSORS}, {STATE} or {CHECKSUMS}")
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        damaged = [name for name in (TENSORS, STATE) if sums[name] != _checksum(path / name)]
    except (ValueError, KeyError, TypeError):
        damaged = [CHECKSUMS]
    if damaged:
        raise ValueError(f"{path / damaged[0]} is damaged: it is not what was written")


def load_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def open_tensors(path: Path) -> Any:
    """The tensors of a checkpoint by name, each read when asked for.

    Raises: ValueError when the file is not readable.
    """
    try:
        return safe_open(path / TENSORS, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path / TENSORS} is damaged: {error}") from error


def save_model(model: AutoencoderKLMultispectralAdapter, folder: Path) -> None:
    """Write a model in diffusers format, whole or not at all.

    Raises: ValueError when it could not be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        move_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"{folder} could not be written: {error}; make room, then run the same command again"
        ) from error


def _superfluous(newest: Path, keep: int) -> list[Path]:
    # what lies beyond is damaged, or the run would have gone on from there: it must not take the place of a whole one
    upto = [path for path in sorted(newest.parent.glob("step-*")) if path <= newest]
    measured = {path: score for path in upto if (score := _score(path)) is not None}
    best = min(measured, key=lambda path: measured[path], default=None)
    return [path for path in upto[:-keep] if path != best]


def _score(path: Path) -> float | None:
    try:
        score: float | None = load_state(path).get("score")
    except (OSError, ValueError):
        return None
    return score if score is not None and math.isfinite(score) else None


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            checksum = crc32c(chunk, checksum)
    return checksum
