"""Runs of real processes on two machines with a network and no shared disk. A real link is cut."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from ..conftest import ROOT, tiny_run
from ..namespaces import TwoMachines, two_machines
from ..servers import set_credentials

TRAIN = ROOT / "train" / "train.py"
RUN = {"train__max_steps": 12, "train__checkpoint_every": 3, "train__eval_every": 5}


@pytest.fixture
def machines() -> Iterator[TwoMachines]:
    with two_machines() as machines:
        yield machines


class Run:
    """A run on both machines, each with its own disk."""

    def __init__(
        self, machines: TwoMachines, shards: Path, disks: Path, script: Path = TRAIN, **overrides: object
    ) -> None:
        self._disks = [disks / f"disk-{machine}" for machine in range(2)]
        disks.mkdir(exist_ok=True)
        self._launchers = []
        for machine, disk in enumerate(self._disks):
            arguments = tiny_run(shards, **{"out": disk / "run", **RUN, **overrides})
            self._launchers.append(machines.launch(machine, script, *arguments, scratch=disk))

    def await_step(self, step: int) -> None:
        deadline = time.monotonic() + 200
        while not any(f'"step": {step},' in log.read_text() for log in self._disks[0].glob("*/metrics.jsonl")):
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
        """Return exit code and output on each machine."""
        try:
            codes = [launcher.wait(within_s) for launcher in self._launchers]
        finally:
            self.kill()
        texts = [[(disk / name).read_text() for name in ("stdout", "stderr")] for disk in self._disks]
        return [subprocess.CompletedProcess([], code, *text) for code, text in zip(codes, texts, strict=True)]


def weights(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "model" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_machines_without_a_shared_disk_resume_bit_for_bit_after_a_cut_link_and_a_kill(
    launch, leaf_shards, machines, tmp_path
):
    alone = tmp_path / "one machine"
    done = launch(TRAIN, *tiny_run(leaf_shards, alone, **RUN), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]

    timeout_s = 15
    run = Run(machines, leaf_shards, tmp_path, train__timeout_s=timeout_s)
    run.await_step(4)
    machines.pull_cable()
    # long enough for a busy machine; without the time-out the ranks would wait forever
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


SERVE = """
import pathlib, sys, boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(sys.argv[1], 9000, verbose=False)
server.start()
client = boto3.client("s3")
client.create_bucket(Bucket="leaves")
print("serving", flush=True)
for folder in map(str.strip, sys.stdin):
    for one in client.list_objects_v2(Bucket="leaves")["Contents"]:
        path = pathlib.Path(folder, one["Key"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.get_object(Bucket="leaves", Key=one["Key"])["Body"].read())
    print("copied", flush=True)
"""
"""An S3 server that copies all its objects to the folders that it is given."""


@pytest.mark.slow
def test_machines_that_lose_their_disks_resume_from_a_store_bit_for_bit(
    launch, leaf_shards, machines, impatient, monkeypatch, tmp_path
):
    alone = tmp_path / "one machine"
    done = launch(TRAIN, *tiny_run(leaf_shards, alone, **RUN), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]

    set_credentials(monkeypatch, f"http://{machines.addresses[0]}:9000")
    server = machines.run(0, sys.executable, "-c", SERVE, machines.addresses[0])
    try:
        assert server.stdout is not None
        assert server.stdin is not None
        server.stdout.readline()
        overrides = {"script": impatient, "out": "s3://leaves/run", "data__trace": True, "train__checkpoint_every": 2}
        run = Run(machines, leaf_shards, tmp_path / "first", **overrides)
        run.await_step(9)
        run.kill()
        first, second = Run(machines, leaf_shards, tmp_path / "second", **overrides).end()
        assert first.returncode == second.returncode == 0, first.stderr[-3000:]
        assert "resumed at step" in first.stdout
        print(tmp_path / "store", file=server.stdin, flush=True)
        server.stdout.readline()
    finally:
        server.kill()
        server.wait()
    expected, actual = weights(alone), weights(tmp_path / "store" / "run")
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)
    records = [tmp_path / "store" / "run" / "trace" / f"rank-0000{rank}.jsonl" for rank in range(2)]
    assert [json.loads(record.read_text().splitlines()[-1])["step"] for record in records] == [12, 12]
