"""The log of the main process: files, TensorBoard and the screen."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msvae.training.run_log import RunLog

SHOW_STEPS = """
from msvae.training.run_log import Screen
screen = Screen(0, 40)
for step in range(1, 41):
    row = {"step": step, "loss": 1 / step, "angle_deg": 5.25, "coverage": 0.5, "samples_per_s": 12.0, "step_s": 2.0}
    screen.step(row)
screen.say("finished")
screen.close()
"""


def row(step: int) -> dict:
    return {
        "step": step, "loss": 1.0 / step, "coverage": 0.5, "coverage_histogram": [0] * 9 + [4], "samples_per_s": 2.0,
        "step_s": 2.0,
    }  # fmt: skip


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    log = RunLog(tmp_path, -1, 3, evaluated=False)
    log.step({**row(1), "loss": float("inf"), "mse_per_channel": {"475nm": float("nan"), "539nm": 0.5}})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    logged = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert logged["loss"] is None
    assert logged["mse_per_channel"] == {"475nm": None, "539nm": 0.5}


def validation_row(step: int) -> dict:
    return {"step": step, "loss": 0.5, "psnr_db": 30.0, "angle_deg": 3.0}


def scalars(out: Path, tag: str) -> list[int]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def on_terminal(**environment: str) -> str:
    """Return the output on a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    variables = {"TERM": "xterm-256color", "COLUMNS": "100", **environment}
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", SHOW_STEPS], stdout=theirs, env={**inherited, **variables}
    ) as process:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 65536):
                seen += part
        except OSError:
            pass  # Linux reports in this way that the other end is closed
    os.close(ours)
    assert process.returncode == 0
    return seen.decode()


def test_a_terminal_shows_one_progress_bar_with_loss_angle_and_speed():
    seen = on_terminal()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen).rstrip().splitlines()[-1]
    assert re.search(r"training ━+ 40/40 loss 0\.0250  angle 5\.25°  coverage 0\.50  12\.0 tiles/s 0:00:00$", last)
    assert len(last) <= 100
    assert "\x1b[38;5" in seen
    assert "step 1/40" not in seen


def test_no_color_shows_the_bar_without_colours():
    seen = on_terminal(NO_COLOR="1")
    assert "40/40 " in seen
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", seen)


def test_without_a_terminal_plain_lines_are_printed():
    done = subprocess.run([sys.executable, "-c", SHOW_STEPS], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "step 2/40  loss 0.5000  angle 5.25°  coverage 0.50  12.0 tiles/s  0:01:16 left"
    assert len(lines) == 21
    assert lines[-1] == "finished"
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_repeated_evaluation_is_logged_once_and_a_saved_one_is_kept(tmp_path, evaluated):
    """A checkpoint with a score was written after the evaluation of its step, one without a score before it."""
    log = RunLog(tmp_path, -1, 9, evaluated=False)
    for step in range(1, 7):
        log.step(row(step))
        if step in (2, 4):
            log.validation(validation_row(step))
    log.flush()  # then the run is killed
    again = RunLog(tmp_path, 4, 9, evaluated=evaluated)
    if not evaluated:
        again.validation(validation_row(4))
    again.step(row(5))
    again.close()
    for name, steps in (("metrics", [1, 2, 3, 4, 5]), ("validation", [2, 4])):
        logged = [json.loads(line)["step"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert logged == steps
        assert scalars(tmp_path, f"{'train' if name == 'metrics' else name}/loss") == steps
    log.close()


def test_a_picture_that_cannot_be_drawn_causes_a_warning_and_the_run_continues(tmp_path, capsys):
    def fail() -> Figure:
        raise RuntimeError("no leaf")

    log = RunLog(tmp_path, -1, 2, evaluated=False)
    log.draw({"validation/tiles": fail, "validation/bands": lambda: Figure()}, 1)
    log.step(row(1))
    log.finish()
    log.step(row(2))
    log.close()
    assert "warning: a picture of step 1 was not drawn: RuntimeError: no leaf" in capsys.readouterr().out
    assert scalars(tmp_path, "train/loss") == [1, 2]
