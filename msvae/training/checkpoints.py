"""Checkpoints on disk: tensors in safetensors, all other state in JSON, and checksums of both files.

A checkpoint appears complete or not at all. All random numbers of a run are functions of (seed, step, sample), so no
state of a random generator is stored.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msvae.files import move_folder, write_text
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.runs import library_versions

FOLDER, LATEST = "checkpoints", "latest"
TENSORS, STATE, CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"
READ_BYTES = 2**24


class CheckpointWriter:
    """Writes checkpoints of the main process in a thread, while training continues.

    The tensors are copied to buffers that are allocated once. The thread calls `on_written` after each checkpoint.
    """

    def __init__(self, out: Path, keep: int, on_written: Callable[[], None]) -> None:
        self._out, self._keep, self._on_written = out, keep, on_written
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> float:
        """Copy the tensors, start writing, and return before the checkpoint is written.

        Returns: seconds for which this call waited for the previous checkpoint.
        Raises: ValueError if the previous checkpoint could not be written.
        """
        start_s = time.monotonic()
        self.finish()
        waited_s = time.monotonic() - start_s
        names, devices = [], set()
        for name, tensor in tensors:
            names.append(name)
            devices.add(tensor.device)
            if name not in self._buffers:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name].copy_(tensor, non_blocking=True)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        copies = {name: self._buffers[name] for name in names}
        self._pending = self._thread.submit(self._write, step, copies, state)
        return waited_s

    def check(self) -> None:
        """Report that a checkpoint could not be written, so that the run stops before the next one is due.

        Raises: ValueError if it could not be written.
        """
        if self._pending is not None and self._pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises: ValueError if it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"a checkpoint could not be written to {self._out / FOLDER}: {error}; earlier checkpoints are "
                "complete. Free space, then run the same command again"
            ) from error

    def close(self) -> None:
        """Wait for the last checkpoint, and end the thread."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        write(self._out, step, tensors, state, self._keep)
        self._on_written()


def write(out: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint `out/checkpoints/step-…`, update `latest`, and remove old checkpoints.

    The newest `keep` checkpoints and the one with the lowest score are kept.

    Args: contiguous tensors on the CPU; `state["score"]` is the validation loss of this step, or None.
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
        checksums = {name: _checksum(partial / name) for name in (TENSORS, STATE)}
        (partial / CHECKSUMS).write_text(json.dumps(checksums) + "\n")
        move_folder(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    write_text(final.with_name(LATEST), f"{final.name}\n")
    for old in _superfluous(final, keep):
        shutil.rmtree(old)
    return final


def list_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, without a check of their content."""
    return sorted((out / FOLDER).glob("step-*"))


def newest_valid(out: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is undamaged, and the damage of each newer one."""
    damages = []
    for path in reversed(list_checkpoints(out)):
        try:
            check(path)
        except ValueError as error:
            damages.append(str(error))
        else:
            return path, damages
    return None, damages


def check(path: Path) -> None:
    """Compare a checkpoint with its checksums.

    Raises: ValueError if a file is missing or damaged.
    """
    if not all((path / name).is_file() for name in (TENSORS, STATE, CHECKSUMS)):
        raise ValueError(f"{path} is not a checkpoint: {TENSORS}, {STATE} or {CHECKSUMS} is missing")
    try:
        checksums = json.loads((path / CHECKSUMS).read_text())
        damaged = [name for name in (TENSORS, STATE) if checksums[name] != _checksum(path / name)]
    except (ValueError, KeyError, TypeError):
        damaged = [CHECKSUMS]
    if damaged:
        raise ValueError(f"{path / damaged[0]} is damaged: its content is not what was written")


def load_state(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def open_tensors(path: Path) -> Any:
    """Open the tensors of a checkpoint. Each tensor is read when it is requested by name.

    Raises: ValueError if the file cannot be read.
    """
    try:
        return safe_open(path / TENSORS, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path / TENSORS} is damaged: {error}") from error


def save_model(model: AutoencoderKLMultispectralAdapter, folder: Path) -> None:
    """Write a model in diffusers format, complete or not at all.

    Raises: ValueError if it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        move_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"{folder} could not be written: {error}; free space, then run the same command again"
        ) from error


def _superfluous(newest: Path, keep: int) -> list[Path]:
    # Checkpoints after `newest` are damaged: the run did not resume from them. They must not replace undamaged ones.
    until_newest = [path for path in sorted(newest.parent.glob("step-*")) if path <= newest]
    scores = {path: score for path in until_newest if (score := _score(path)) is not None}
    best = min(scores, key=lambda path: scores[path], default=None)
    return [path for path in until_newest[:-keep] if path != best]


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
