"""What a person sees while a run trains: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINES = 20
PLAIN_SECONDS = 30.0
"""Without a terminal: so many lines in all, or one in so many seconds, whichever is more."""


class Screen:
    """Colours follow NO_COLOR and TERM, as rich does."""

    def __init__(self, last_step: int, max_steps: int) -> None:
        self._console = Console()
        self._max_steps, self._last_line_s = max_steps, time.monotonic()
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=max_steps, completed=last_step, state="")
        self._progress.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """A logged step."""
        step = row["step"]
        angle = f"  angle {row['angle_deg']:.2f}°" if "angle_deg" in row else ""
        state = f"loss {row['loss']:.4f}{angle}  coverage {row['coverage']:.2f}  {row['samples_per_s']:.1f} tiles/s"
        self._progress.update(self._task, completed=step, state=state)
        now = time.monotonic()
        milestone = step % max(1, self._max_steps // PLAIN_LINES) == 0 or now - self._last_line_s > PLAIN_SECONDS
        if self._progress.disable and (milestone or step == self._max_steps):
            self._last_line_s = now
            left = timedelta(seconds=round((self._max_steps - step) * row["step_s"]))
            self.say(f"step {step}/{self._max_steps}  {state}  {left} left")

    def say(self, line: str) -> None:
        """A line, above the bar."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()
