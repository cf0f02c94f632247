"""How fast steps go, and what they wait for, as the main process sees it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from msvae.distributed.collectives import Ranks


class Pace:
    """Of the steps since the last row. Nothing here waits for a device but `row`."""

    def __init__(self, ranks: Ranks, global_batch_size: int, step: int) -> None:
        self._device, self._world_size, self._global_batch_size = ranks.device, ranks.world_size, global_batch_size
        self._marks = ranks.is_main and ranks.device.type == "cuda"
        self.restart(step)

    def restart(self, step: int) -> None:
        """Count from here on, after some finished steps."""
        self._step, self._began_s = step, time.monotonic()
        self._data_wait_s = self._joined_s = 0.0
        self._joins: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._leaf_pixels = torch.zeros((), dtype=torch.float64, device=self._device)

    def add(self, counts: Mapping[str, Tensor]) -> None:
        """The joined counts of a finished step."""
        self._leaf_pixels = self._leaf_pixels + counts["valid_pixels"]

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Surrounds the wait for the next batches."""
        began_s = time.monotonic()
        yield
        self._data_wait_s += time.monotonic() - began_s

    @contextmanager
    def joining(self) -> Iterator[None]:
        """Surrounds a step's collective. On a GPU the stream waits in it and the host does not."""
        if self._marks:
            begin = _mark()
            yield
            self._joins.append((begin, _mark()))
            return
        began_s = time.monotonic()
        yield
        self._joined_s += time.monotonic() - began_s

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Surrounds what is no part of a step."""
        began_s = time.monotonic()
        yield
        self._began_s += time.monotonic() - began_s

    def row(self, step: int) -> dict[str, Any]:
        """What the log says of the steps since the last row."""
        steps, took_s = step - self._step, time.monotonic() - self._began_s
        samples_per_s = steps * self._global_batch_size / took_s
        leaf_pixels_per_s = float(self._leaf_pixels) / took_s
        joined_s = self._joined_s
        if self._joins:
            self._joins[-1][1].synchronize()
            joined_s = sum(begin.elapsed_time(end) for begin, end in self._joins) / 1000
        row = {
            "samples_per_s": samples_per_s,
            "samples_per_s_per_device": samples_per_s / self._world_size,
            "leaf_pixels_per_s": leaf_pixels_per_s,
            "leaf_pixels_per_s_per_device": leaf_pixels_per_s / self._world_size,
            "step_s": took_s / steps,
            "data_wait_s": self._data_wait_s / steps,
            "join_s": joined_s / steps,
            "host_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
        if self._device.type == "cuda":
            row["device_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        self.restart(step)
        return row


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
