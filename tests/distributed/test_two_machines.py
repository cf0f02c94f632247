"""Two machines with a network between them and no shared disk. Real processes, a real cable that is pulled."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from ..conftest import ROOT, tiny_run
from ..namespaces import TwoMachines, two_machines

TRAIN = ROOT / "train" / "train.py"
RUN = {"train__max_steps": 12, "train__checkpoint_every": 3, "train__eval_every": 5}


@pytest.fixture
def machines() -> Iterator[TwoMachines]:
    with two_machines() as machines:
        yield machines


class Run:
    """On both machines, each with its own disk."""

    def __init__(self, machines: TwoMachines, shards: Path, disks: Path, **overrides: object) -> None:
        self.outs = [disks / f"disk-{machine}" / "run" for machine in range(2)]
        self._scratch = [out.parent for out in self.outs]
        self._launchers = [
            machines.launch(
                machine,
                TRAIN,
                *tiny_run(shards, self.outs[machine], **{**RUN, **overrides}),
                scratch=self._scratch[machine],
            )
            for machine in range(2)
        ]

    def await_step(self, step: int) -> None:
        log, deadline = self.outs[0] / "metrics.jsonl", time.monotonic() + 200
        while not log.is_file() or f'"step": {step},' not in log.read_text():
            assert all(launcher.poll() is None for launcher in self._launchers), "the run ended too early"
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        trees = [psutil.Process(launcher.pid) for launcher in self._launchers if launcher.poll() is None]
        processes = [process for tree in trees for process in (*tree.children(recursive=True), tree)]
        for process in processes:
            process.kill()
        for launcher in self._launchers:
            launcher.wait()

    def end(self, within_s: float = 300) -> list[subprocess.CompletedProcess[str]]:
        """How it ended on each machine."""
        try:
            codes = [launcher.wait(within_s) for launcher in self._launchers]
        finally:
            self.kill()
        texts = [[(place / name).read_text() for name in ("stdout", "stderr")] for place in self._scratch]
        return [subprocess.CompletedProcess([], code, *text[:2]) for code, text in zip(codes, texts, strict=True)]


def weights(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "model" / "diffusion_pytorch_model.safetensors")


def test_machines_without_a_shared_disk_meet_a_pulled_cable_and_a_kill_and_go_on_bit_for_bit(
    launch, leaf_shards, machines, tmp_path
):
    alone = tmp_path / "one machine"
    done = launch(TRAIN, *tiny_run(leaf_shards, alone, **RUN), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]

    timeout_s = 15
    run = Run(machines, leaf_shards, tmp_path, train__timeout_s=timeout_s)
    run.await_step(4)
    machines.pull_cable()
    # generous to a busy machine; without the time-out it would be for ever
    for ended in run.end(within_s=10 * timeout_s):
        assert ended.returncode != 0
        assert "Timed out" in ended.stderr, ended.stderr[-3000:]
    machines.plug_in()

    run = Run(machines, leaf_shards, tmp_path)
    run.await_step(7)
    run.kill()

    first, second = Run(machines, leaf_shards, tmp_path).end()
    assert first.returncode == second.returncode == 0, first.stderr[-3000:]
    assert "resumed at step 6" in first.stdout
    disks = [tmp_path / f"disk-{machine}" / "run" for machine in range(2)]
    assert not (disks[1] / "checkpoints").exists(), "one machine writes"
    expected, actual = weights(alone), weights(disks[0])
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)
