"""What the main process writes while a run trains: JSON lines, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"


class JsonLines:
    """A file of one JSON object a line, each with its `step`; lines after the step of a resume are dropped."""

    def __init__(self, path: Path, last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = (
            [] if not path.is_file() else [line for line in whole_lines(path) if json.loads(line)["step"] <= last_step]
        )
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.rename(path)
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object."""
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunLog:
    """The log of a run that goes on after `last_step`, or begins after step -1."""

    def __init__(self, out: Path, last_step: int, max_steps: int) -> None:
        self._metrics = JsonLines(out / METRICS, last_step)
        self._validation = JsonLines(out / VALIDATION, last_step)
        self._tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=last_step + 1)
        self._screen = _Screen(max(0, last_step), max_steps)

    def step(self, row: Mapping[str, Any]) -> None:
        """One logged optimizer step: a line, scalars, and the screen."""
        self._metrics.write(row)
        self._scalars("train", row)
        self._screen.step(row)

    def validation(self, row: Mapping[str, Any]) -> None:
        """One evaluation on the validation split."""
        self._validation.write(row)
        self._scalars("validation", row)
        self._screen.say(
            f"validation at step {row['step']}: loss {row['loss']:.4f}, leaf PSNR {row['psnr_db']:.2f} dB, "
            f"spectral angle {row['angle_deg'] or 0:.2f} degrees"
        )

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """A picture for TensorBoard."""
        self._tensorboard.add_figure(tag, figure, step)

    def text(self, tag: str, text: str) -> None:
        """A text for TensorBoard, shown as it is."""
        self._tensorboard.add_text(tag, f"```\n{text}\n```", 0)

    def say(self, line: str) -> None:
        """A line on the screen."""
        self._screen.say(line)

    def flush(self) -> None:
        """Have all that was logged in files; TensorBoard's writer holds it back for minutes."""
        self._tensorboard.flush()

    def close(self) -> None:
        """Write out everything."""
        self._screen.close()
        self._metrics.close()
        self._validation.close()
        self._tensorboard.close()

    def _scalars(self, group: str, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._tensorboard.add_scalar(f"{group}/{name}", value, row["step"])
            elif isinstance(value, Mapping):
                for part, number in value.items():
                    self._tensorboard.add_scalar(f"{group}_{name}/{part}", number, row["step"])


class _Screen:
    """A progress bar on a terminal, a line now and then elsewhere."""

    PLAIN_LINES = 20
    PLAIN_SECONDS = 30.0

    def __init__(self, last_step: int, max_steps: int) -> None:
        self._console = Console()
        self._max_steps, self._last_line_s = max_steps, time.monotonic()
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=max_steps, completed=last_step, state="")
        self._progress.start()

    def step(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        state = f"loss {row['loss']:.4f}  coverage {row['coverage']:.2f}  {row['samples_per_s']:.1f} tiles/s"
        self._progress.update(self._task, completed=step, state=state)
        now = time.monotonic()
        milestone = (
            step % max(1, self._max_steps // self.PLAIN_LINES) == 0 or now - self._last_line_s > self.PLAIN_SECONDS
        )
        if self._progress.disable and (milestone or step == self._max_steps):
            self._last_line_s = now
            self.say(f"step {step}/{self._max_steps}  {state}")

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def whole_lines(path: Path) -> list[str]:
    """Whole lines; a kill can leave half of the last one."""
    return [line for line in path.read_text().split("\n")[:-1] if line]
