"""Checkpoints are copied between two steps and written beside the next ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from msvae.training import checkpoints as folder


class CheckpointWriter:
    """Of the main process. The copy lies in buffers that are made once. Its thread calls `written` after each."""

    def __init__(self, out: Path, keep: int, written: Callable[[], None]) -> None:
        self._out, self._keep, self._written = out, keep, written
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> float:
        """Copy the tensors and begin to write; return before that is done.

        Returns: seconds for which the checkpoint before was waited for, written more slowly than steps are taken.
        Raises: ValueError when the checkpoint before could not be written.
        """
        began_s = time.monotonic()
        self.finish()
        waited_s = time.monotonic() - began_s
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
        copied = {name: self._buffers[name] for name in names}
        self._writing = self._thread.submit(self._write, step, copied, state)
        return waited_s

    def _write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        folder.write(self._out, step, tensors, state, self._keep)
        self._written()

    def check(self) -> None:
        """Take notice of a write that has ended, so that a run does not go on for long without being saved.

        Raises: ValueError when it failed.
        """
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until what was saved is on the disk.

        Raises: ValueError when it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"a checkpoint could not be written to {self._out / folder.FOLDER}: {error}; those before it are "
                "whole. Make room, then run the same command again"
            ) from error

    def close(self) -> None:
        """Finish and end the thread."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()
