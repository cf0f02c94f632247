"""What the main process writes while a run trains: JSON lines, TensorBoard, the screen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from msvae.losses.coverage import NUM_BINS
from msvae.report.charts import coverage_figure
from msvae.runs import METRICS, VALIDATION, JsonLines, whole_lines
from msvae.training.log.board import Board
from msvae.training.log.screen import Screen


class RunLog:
    """The log of a run that goes on after `last_step`, or begins after step -1.

    Args: whether the evaluation of `last_step`, if one was due, is behind it. If not it is made again, and what an
        earlier start may have written of it is dropped.
    """

    def __init__(self, out: Path, last_step: int, max_steps: int, judged: bool) -> None:
        self._metrics = JsonLines(out / METRICS, last_step)
        self._validation = JsonLines(out / VALIDATION, last_step if judged else last_step - 1)
        self._board = Board(out / "tensorboard", last_step + 1 if judged else max(0, last_step))
        if not judged:
            # TensorBoard drops whole steps, so the step comes back without its evaluation
            for row in map(json.loads, whole_lines(out / METRICS)[-1:]):
                if row["step"] == last_step:
                    self._board.row("train", row)
        self._screen = Screen(max(0, last_step), max_steps)
        self._pictures = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._drawn: list[tuple[int, Future[None]]] = []
        self._tiles_by_coverage = np.zeros(NUM_BINS, np.int64)

    def step(self, row: Mapping[str, Any]) -> None:
        """One logged optimizer step: a line, scalars, and the screen."""
        self._metrics.write(row)
        self._board.row("train", row)
        self._screen.step(row)
        histogram = np.array(row["coverage_histogram"])
        self._tiles_by_coverage = (
            histogram if not len(self._tiles_by_coverage) else self._tiles_by_coverage + histogram
        )
        self._name_failed_pictures()

    def validation(self, row: Mapping[str, Any]) -> None:
        """One evaluation on the validation split."""
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
        """Pictures for TensorBoard by tag, drawn in a thread while training goes on; a kill may lose the last."""
        for tag, figure in figures.items():
            self._drawn.append((step, self._pictures.submit(self._draw, tag, figure, step)))

    def describe(self, texts: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """What TensorBoard tells of the run: texts in Markdown by tag, and the settings for its table of runs."""
        self._board.describe(texts, settings)

    def say(self, line: str) -> None:
        """A line on the screen."""
        self._screen.say(line)

    def flush(self) -> None:
        """Have all that was logged in files; TensorBoard's writer holds it back for minutes."""
        self._board.flush()

    def finish(self) -> None:
        """Nothing more will be logged but lines on the screen: wait for the last pictures and write out everything."""
        self._pictures.shutdown()
        self._name_failed_pictures()
        self._board.flush()

    def close(self) -> None:
        """Close all files, also those of a run that failed."""
        self._pictures.shutdown()
        self._name_failed_pictures()
        self._screen.close()
        self._metrics.close()
        self._validation.close()
        self._board.close()

    def _draw(self, tag: str, figure: Callable[[], Figure], step: int) -> None:
        self._board.figure(tag, figure(), step)

    def _name_failed_pictures(self) -> None:
        """A picture is not worth a run: that it could not be drawn is a warning."""
        for step, drawn in [entry for entry in self._drawn if entry[1].done()]:
            self._drawn.remove((step, drawn))
            if (error := drawn.exception()) is not None:
                self.say(f"warning: a picture of step {step} was not drawn: {type(error).__name__}: {error}")
