"""The log of a run that the main process writes: JSON lines, TensorBoard and the screen."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from msvae.losses.coverage import NUM_BINS
from msvae.report.charts import coverage_figure
from msvae.runs import METRICS, VALIDATION, JsonLines, complete_lines
from msvae.training.board import Board

PLAIN_LINES = 20
PLAIN_SECONDS = 30.0
"""Without a terminal, about this many lines are printed per run, and one whenever the last is older than this."""


class RunLog:
    """Log of a run that continues after `last_step`, or of a new run if `last_step` is -1.

    Args: `evaluated` is True if the checkpoint contains an evaluation of `last_step`. If not, a due evaluation is
        repeated, so rows of it that an earlier start may have logged are dropped.
    """

    def __init__(self, out: Path, last_step: int, max_steps: int, evaluated: bool) -> None:
        self._metrics = JsonLines(out / METRICS, last_step)
        self._validation = JsonLines(out / VALIDATION, last_step if evaluated else last_step - 1)
        self._board = Board(out / "tensorboard", last_step + 1 if evaluated else max(0, last_step))
        if not evaluated:
            # TensorBoard drops complete steps, so the training row of the step is written again
            for row in map(json.loads, complete_lines(out / METRICS)[-1:]):
                if row["step"] == last_step:
                    self._board.row("train", row)
        self._screen = Screen(max(0, last_step), max_steps)
        self._pictures = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._pending: list[tuple[int, Future[None]]] = []
        self._tiles_by_coverage = np.zeros(NUM_BINS, np.int64)

    def step(self, row: Mapping[str, Any]) -> None:
        """Log an optimizer step."""
        self._metrics.write(row)
        self._board.row("train", row)
        self._screen.step(row)
        self._tiles_by_coverage += np.array(row["coverage_histogram"])
        self._report_failed_pictures()

    def validation(self, row: Mapping[str, Any]) -> None:
        """Log an evaluation on the validation split."""
        self._validation.write(row)
        self._board.row("validation", row)
        if self._tiles_by_coverage.any():
            self.draw({"train_coverage/histogram": partial(coverage_figure, self._tiles_by_coverage)}, row["step"])
            self._tiles_by_coverage = np.zeros(NUM_BINS, np.int64)
        psnr_db, angle_deg = (math.nan if row[name] is None else row[name] for name in ("psnr_db", "angle_deg"))
        self._screen.say(
            f"validation at step {row['step']}: loss {row['loss']:.4f}, leaf PSNR {psnr_db:.2f} dB, "
            f"spectral angle {angle_deg:.2f} degrees"
        )

    def draw(self, figures: Mapping[str, Callable[[], Figure]], step: int) -> None:
        """Draw pictures for TensorBoard, by tag, in a thread while training continues.

        A killed run may lose the pictures that were not finished.
        """
        for tag, figure in figures.items():
            self._pending.append((step, self._pictures.submit(self._draw, tag, figure, step)))

    def describe(self, texts: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Describe the run in TensorBoard. Args: Markdown texts by tag; settings for the table of runs."""
        self._board.describe(texts, settings)

    def say(self, line: str) -> None:
        """Print a line on the screen."""
        self._screen.say(line)

    def flush(self) -> None:
        """Write all values to the files. TensorBoard's writer buffers them for minutes."""
        self._board.flush()

    def finish(self) -> None:
        """Finish the last pictures and flush. Afterwards, only `say` and `close` may be called."""
        self._pictures.shutdown()
        self._report_failed_pictures()
        self._board.flush()

    def close(self) -> None:
        """Close all files, also after an error."""
        self._pictures.shutdown()
        self._report_failed_pictures()
        self._screen.close()
        self._metrics.close()
        self._validation.close()
        self._board.close()

    def _draw(self, tag: str, figure: Callable[[], Figure], step: int) -> None:
        self._board.figure(tag, figure(), step)

    def _report_failed_pictures(self) -> None:
        """Print a warning for each picture that could not be drawn. It does not stop the run."""
        for step, drawn in [entry for entry in self._pending if entry[1].done()]:
            self._pending.remove((step, drawn))
            if (error := drawn.exception()) is not None:
                self.say(f"warning: a picture of step {step} was not drawn: {type(error).__name__}: {error}")


class Screen:
    """Progress of a run: a progress bar on a terminal, or some lines in a file. Colours follow NO_COLOR and TERM."""

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
        """Show a logged step."""
        step = row["step"]
        angle = f"  angle {row['angle_deg']:.2f}°" if "angle_deg" in row else ""
        state = f"loss {row['loss']:.4f}{angle}  coverage {row['coverage']:.2f}  {row['samples_per_s']:.1f} tiles/s"
        self._progress.update(self._task, completed=step, state=state)
        now_s = time.monotonic()
        due = step % max(1, self._max_steps // PLAIN_LINES) == 0 or now_s - self._last_line_s > PLAIN_SECONDS
        if self._progress.disable and (due or step == self._max_steps):
            self._last_line_s = now_s
            left = timedelta(seconds=round((self._max_steps - step) * row["step_s"]))
            self.say(f"step {step}/{self._max_steps}  {state}  {left} left")

    def say(self, line: str) -> None:
        """Print a line, above the bar on a terminal."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the progress bar and leave it on the screen."""
        self._progress.stop()
