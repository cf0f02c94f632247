"""Runs of real processes that tests kill, stop or pause while they train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
from safetensors.numpy import load_file

from ..conftest import ROOT, launch_command, tiny_run

TRAIN = ROOT / "train" / "train.py"
PAUSED_TRAIN = Path(__file__).with_name("paused_train.py")
PATIENCE_S = 240
"""Time for which a test waits for an event."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RUN = {
    "train__max_steps": 16,
    "train__checkpoint_every": 3,
    "train__eval_every": 4,
    "data__flips": True,
}


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str

    @property
    def cause(self) -> str:
        """End of the output, from the first failure in torchrun's summary on."""
        return self.stderr[self.stderr.rindex("Root Cause") :]


class InterruptedRun:
    """A run in the background. `pause` names the moment at which it pauses (`paused_train.py`)."""

    def __init__(self, command: list[str], out: Path, folder: Path, pause: str = "nowhere 0 0") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.paused, self.go = out, folder / "paused", folder / "go"
        self._screen = folder / "stdout", folder / "stderr"
        environment = {"PAUSE": pause, "PAUSED": str(self.paused), "GO": str(self.go), "PYTHONPATH": str(ROOT)}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/faults.md
        with self._screen[0].open("w") as stdout, self._screen[1].open("w") as stderr:
            self.launcher = psutil.Popen(
                command, cwd=ROOT, stdout=stdout, stderr=stderr, env={**os.environ, **environment}
            )

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert self.launcher.poll() is None, f"the run ended too early:\n{self._ended().stderr}"
            assert time.monotonic() < deadline, self._ended()
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: logged(self.out)[-1:] >= [step])

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks, in rank order."""
        found = {}
        for process in self.launcher.children(recursive=True):
            if (rank := process.environ().get("RANK")) is not None:
                found[int(rank)] = process
        return [found[rank] for rank in sorted(found)]

    def kill_all(self) -> None:
        processes = [*self.ranks(), self.launcher]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes)

    def end(self, timeout_s: float = PATIENCE_S) -> Ended:
        try:
            self.launcher.wait(timeout_s)
        except psutil.TimeoutExpired:
            self.kill_all()
            raise
        return self._ended()

    def _ended(self) -> Ended:
        return Ended(self.launcher.returncode, *(path.read_text() for path in self._screen))


def accelerated(shards: Path, out: Path, engine: str = "cpu", **overrides: object) -> list[str]:
    """Return the command for two ranks, as in the README."""
    return launch_command(PAUSED_TRAIN, *tiny_run(shards, out, **{**RUN, **overrides}), processes=2, engine=engine)


def torchrun(*options: object) -> list[str]:
    """Return the command for torchrun without accelerate."""
    return [*TORCHRUN, *map(str, options), str(PAUSED_TRAIN)]


def alone(shards: Path, out: Path, **overrides: object) -> subprocess.CompletedProcess[str]:
    """Train on one process without a launcher."""
    command = [sys.executable, str(TRAIN), *tiny_run(shards, out, **{**RUN, **overrides})]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)


def logged(out: Path) -> list[int]:
    """Return the steps in the log."""
    return [row["step"] for row in rows(out)]


def rows(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def weights(out: Path, folder: str = "model") -> dict[str, bytes]:
    tensors = load_file(out / folder / "diffusion_pytorch_model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def steps_kept(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


def errors(ended: Ended | subprocess.CompletedProcess[str]) -> list[str]:
    """Return the error lines of ranks, in the order of the output."""
    return [line for line in ended.stderr.splitlines() if line.startswith("error")]
