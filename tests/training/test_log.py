"""What the main process writes and shows of a run."""

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

from msvae.training.log.run_log import RunLog

SHOWS = """
from msvae.training.log.run_log import Screen
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


def judged(step: int) -> dict:
    return {"step": step, "loss": 0.5, "psnr_db": 30.0, "angle_deg": 3.0}


def scalars(out: Path, tag: str) -> list[int]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def on_terminal(**environment: str) -> str:
    """What a terminal of 100 columns gets to see."""
    ours, theirs = pty.openpty()
    variables = {"TERM": "xterm-256color", "COLUMNS": "100", **environment}
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen([sys.executable, "-c", SHOWS], stdout=theirs, env={**inherited, **variables}) as process:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 65536):
                seen += part
        except OSError:
            pass  # Linux says that the other side is gone
    os.close(ours)
    assert process.returncode == 0
    return seen.decode()


def test_a_terminal_shows_one_bar_with_what_matters_and_lines_above_it():
    seen = on_terminal()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen).rstrip().splitlines()[-1]
    assert re.search(r"training ━+ 40/40 loss 0\.0250  angle 5\.25°  coverage 0\.50  12\.0 tiles/s 0:00:00$", last)
    assert len(last) <= 100
    assert "\x1b[38;5" in seen
    assert "step 1/40" not in seen


def test_no_color_leaves_the_bar_and_takes_its_colours():
    seen = on_terminal(NO_COLOR="1")
    assert "40/40 " in seen
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", seen)


def test_without_a_terminal_there_are_some_plain_lines():
    done = subprocess.run([sys.executable, "-c", SHOWS], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "step 2/40  loss 0.5000  angle 5.25°  coverage 0.50  12.0 tiles/s  0:01:16 left"
    assert len(lines) == 21
    assert lines[-1] == "finished"
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("known", [True, False])
def test_an_evaluation_that_is_made_again_stands_once_and_one_that_is_not_stays(tmp_path, known):
    """A checkpoint that knows its score was written after the evaluation, one that does not before it."""
    log = RunLog(tmp_path, -1, 9, evaluated=False)
    for step in range(1, 7):
        log.step(row(step))
        if step in (2, 4):
            log.validation(judged(step))
    log.flush()  # and then it is killed
    again = RunLog(tmp_path, 4, 9, evaluated=known)
    if not known:
        again.validation(judged(4))
    again.step(row(5))
    again.close()
    for name, steps in (("metrics", [1, 2, 3, 4, 5]), ("validation", [2, 4])):
        logged = [json.loads(line)["step"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert logged == steps
        assert scalars(tmp_path, f"{'train' if name == 'metrics' else name}/loss") == steps
    log.close()


def test_a_picture_that_cannot_be_drawn_is_named_and_the_run_goes_on(tmp_path, capsys):
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
