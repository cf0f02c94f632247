"""Speed of the steps, and the time that they spend waiting, as the main process measures it."""

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
    """Measures the steps since the last row of the log. Only `row` waits for the device."""

    def __init__(self, ranks: Ranks, global_batch_size: int, step: int) -> None:
        self._device, self._world_size, self._global_batch_size = ranks.device, ranks.world_size, global_batch_size
        self._uses_events = ranks.is_main and ranks.device.type == "cuda"
        self.restart(step)

    def restart(self, step: int) -> None:
        """Start a new measurement after `step` finished steps."""
        self._step, self._start_s = step, time.monotonic()
        self._data_wait_s = self._collective_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._leaf_pixels = torch.zeros((), dtype=torch.float64, device=self._device)

    def add(self, counts: Mapping[str, Tensor]) -> None:
        """Add the counts of a finished step, summed over ranks."""
        self._leaf_pixels = self._leaf_pixels + counts["valid_pixels"]

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure a block that waits for the next batches."""
        start_s = time.monotonic()
        yield
        self._data_wait_s += time.monotonic() - start_s

    @contextmanager
    def in_collective(self) -> Iterator[None]:
        """Measure a block with the collective of a step. On a GPU the stream waits in it, but the host does not."""
        if self._uses_events:
            start = _record_event()
            yield
            self._events.append((start, _record_event()))
            return
        start_s = time.monotonic()
        yield
        self._collective_s += time.monotonic() - start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a block that is not part of a step."""
        start_s = time.monotonic()
        yield
        self._start_s += time.monotonic() - start_s

    def row(self, step: int) -> dict[str, Any]:
        """Return the means over the steps since the last row for the log, and start a new measurement."""
        steps, total_s = step - self._step, time.monotonic() - self._start_s
        samples_per_s = steps * self._global_batch_size / total_s
        leaf_pixels_per_s = float(self._leaf_pixels) / total_s
        collective_s = self._collective_s
        if self._events:
            self._events[-1][1].synchronize()
            collective_s = sum(start.elapsed_time(end) for start, end in self._events) / 1000
        row = {
            "samples_per_s": samples_per_s,
            "samples_per_s_per_device": samples_per_s / self._world_size,
            "leaf_pixels_per_s": leaf_pixels_per_s,
            "leaf_pixels_per_s_per_device": leaf_pixels_per_s / self._world_size,
            "step_s": total_s / steps,
            "data_wait_s": self._data_wait_s / steps,
            "join_s": collective_s / steps,
            "host_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
        if self._device.type == "cuda":
            row["device_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        self.restart(step)
        return row


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
