"""Requests to stop: after a signal to any rank, all ranks finish their step, save and exit."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FORWARDED = signal.SIGUSR2
"""Signal by which `launch/node.sh` forwards a request that ranks may have received already. It never counts as a
second request."""
SAME_REQUEST_S = 1.0
"""Signals within this time are one request: a launcher may forward a signal that its whole process group received."""


class StopRequest:
    """Receives requests to stop. A second request ends the process immediately, even while it waits for other ranks.

    A thread reads the signals from a pipe, because Python's signal handlers do not run during a collective.
    """

    def __init__(self) -> None:
        self._asked_at_s: float | None = None
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*SIGNALS, FORWARDED):
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._read_signals, args=(reader,), name="signals", daemon=True).start()

    def vote(self, device: torch.device) -> Tensor:
        """Return 1 if this rank was asked to stop, else 0, (), to be summed over ranks."""
        return torch.full((), float(self._asked_at_s is not None), device=device)

    def ignore_signals(self) -> None:
        """Ignore signals from now on. When the first rank exits, the launcher signals the ranks that still run."""
        for number in (*SIGNALS, FORWARDED):
            signal.signal(number, signal.SIG_IGN)

    def _read_signals(self, reader: int) -> None:
        while signals := os.read(reader, 1):
            if signals[0] in (*SIGNALS, FORWARDED):
                self._receive(signals[0])

    def _receive(self, number: int) -> None:
        now_s = time.monotonic()
        first_s = self._asked_at_s
        if first_s is not None and now_s - first_s > SAME_REQUEST_S and number != FORWARDED:
            os._exit(128 + number)
        self._asked_at_s = first_s or now_s


class DelayedRead:
    """Reads one number per step from the device, one step late, so that no step waits for its own number."""

    def __init__(self) -> None:
        self._on_host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def exchange(self, number: Tensor) -> float:
        """Start copying the number of this step, and return that of the previous step, 0 at first."""
        previous = self._read()
        self._on_host = torch.empty((), dtype=number.dtype, pin_memory=number.is_cuda)
        self._on_host.copy_(number, non_blocking=True)
        if number.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return previous

    def _read(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return 0.0 if self._on_host is None else float(self._on_host)
