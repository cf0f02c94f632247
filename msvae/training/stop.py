"""A polite end: a signal to any rank lets all of them finish the step, save and leave."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PASSED_ON = signal.SIGUSR2
"""What `launch/node.sh` makes of a request that may have reached ranks already: never a second one."""
SAME_REQUEST_S = 1.0
"""A launcher that passes on what its whole group has got sends the same request twice."""


class StopRequest:
    """Whether this process was asked to stop. A second request ends it at once, even while it waits for others.

    Handlers of Python run between its own instructions, not within a collective: so a thread reads which signals came.
    """

    def __init__(self) -> None:
        self._asked_at_s: float | None = None
        came, comes = os.pipe()
        os.set_blocking(comes, False)
        signal.set_wakeup_fd(comes, warn_on_full_buffer=False)
        for number in (*SIGNALS, PASSED_ON):
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(came,), name="signals", daemon=True).start()

    def vote(self, device: torch.device) -> Tensor:
        """1 when this rank was asked, to be added over ranks."""
        return torch.full((), float(self._asked_at_s is not None), device=device)

    def served(self) -> None:
        """All is saved: when the first rank leaves, the launcher signals the others, which must come to their end."""
        for number in (*SIGNALS, PASSED_ON):
            signal.signal(number, signal.SIG_IGN)

    def _listen(self, came: int) -> None:
        while signals := os.read(came, 1):
            if signals[0] in (*SIGNALS, PASSED_ON):
                self._hear(signals[0])

    def _hear(self, number: int) -> None:
        now_s = time.monotonic()
        first_s = self._asked_at_s
        if first_s is not None and now_s - first_s > SAME_REQUEST_S and number != PASSED_ON:
            os._exit(128 + number)
        self._asked_at_s = first_s or now_s


class Late:
    """Numbers of the step before, on the host: no step waits for its own."""

    def __init__(self) -> None:
        self._on_host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def swap(self, number: Tensor) -> float:
        """Give the number of this step, get that of the one before; 0 at first."""
        before = self._read()
        self._on_host = torch.empty((), dtype=number.dtype, pin_memory=number.is_cuda)
        self._on_host.copy_(number, non_blocking=True)
        if number.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return before

    def _read(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return 0.0 if self._on_host is None else float(self._on_host)
