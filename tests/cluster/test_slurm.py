"""launch/slurm.sbatch on a real Slurm of two nodes: jobs that are pre-empted, at their time limit, or cancelled."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import ROOT, tiny_run
from ..distributed.interrupted_runs import PAUSED_TRAIN, RUN, logged, weights
from .slurm import Slurm, slurm_cluster

NODES = ("node-0", "node-1")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def undisturbed(launch, leaf_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(ROOT / "train" / "train.py", *tiny_run(leaf_shards, out, **RUN))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


class Job:
    """A job on two nodes, in a copy of the repository. It pauses once, in the evaluation after step 4."""

    def __init__(self, slurm: Slurm, folder: Path, shards: Path, *options: object) -> None:
        self.slurm, self.folder, self.out = slurm, folder, folder / "run"
        self.paused, self.go = folder / "paused", folder / "go"
        for name in ("launch", "configs", "train"):
            (folder / name).symlink_to(ROOT / name)
        pause = {"PAUSE": "evaluation 0 4", "PAUSED": self.paused, "GO": self.go, "PYTHONPATH": ROOT}
        slurm.environment.update({name: str(value) for name, value in pause.items()})
        words = ["--nodes", 2, *options, "launch/slurm.sbatch", PAUSED_TRAIN, *tiny_run(shards, self.out, **RUN)]
        self.id = slurm.submit(*words, cwd=folder)

    def wait_for_pause(self) -> None:
        self.slurm.wait_until(lambda: self.paused.exists() or self.state not in ("PENDING", "RUNNING"))
        assert self.paused.exists(), self.logs

    @property
    def state(self) -> str:
        return self.slurm.field(self.id, "JobState")

    @property
    def logs(self) -> dict[str, str]:
        """Logs of the batch script and of each node."""
        logs = {name: self.folder / f"slurm-{self.id}" / f"{name}.log" for name in NODES}
        logs["batch"] = self.folder / f"slurm-{self.id}.log"
        return {name: log.read_text() if log.exists() else "" for name, log in logs.items()}

    def all_log(self, words: str) -> bool:
        return all(words in self.logs[node] for node in NODES)

    def assert_ended_as(self, undisturbed: Path) -> None:
        self.slurm.wait_until(lambda: self.state == "COMPLETED")
        assert self.slurm.field(self.id, "Restarts") == "1"
        assert "start 0 on n[1-2]" in self.logs["batch"]
        assert "ended with 75\n" in self.logs["batch"]
        assert "start 1 on n[1-2]" in self.logs["batch"]
        assert "ended with 0\n" in self.logs["batch"]
        assert sum("resumed at step " in self.logs[node] for node in NODES) == 1
        assert logged(self.out) == list(range(1, 17))
        for folder in ("model", "best", "untrained"):
            assert weights(self.out, folder) == weights(undisturbed, folder), folder


def test_a_preempted_job_is_requeued_and_ends_with_the_weights_of_an_undisturbed_run(
    slurm, leaf_shards, undisturbed, tmp_path
):
    job = Job(slurm, tmp_path, leaf_shards)
    job.wait_for_pause()
    urgent = slurm.submit(
        "--partition", "high", "--nodes", 2, "--output", tmp_path / "urgent", "--wrap", "sleep 3", cwd=tmp_path
    )
    slurm.wait_until(lambda: job.all_log("asked to stop by SIGTERM: the ranks finish their step and save"))
    assert slurm.field(urgent, "JobState") == "PENDING", "the pre-empted job has two minutes"
    job.go.touch()
    slurm.wait_until(lambda: slurm.field(urgent, "JobState") == "COMPLETED")
    job.assert_ended_as(undisturbed)


def test_a_job_at_its_time_limit_saves_and_is_requeued(slurm, leaf_shards, undisturbed, tmp_path):
    """Slurm sends the signal two to three minutes before the time limit."""
    job = Job(slurm, tmp_path, leaf_shards, "--time", 5)
    job.wait_for_pause()
    slurm.wait_until(lambda: job.all_log("asked to stop by SIGUSR1: the ranks finish their step and save"))
    job.go.touch()
    job.assert_ended_as(undisturbed)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, leaf_shards, tmp_path):
    job = Job(slurm, tmp_path, leaf_shards)
    job.wait_for_pause()
    slurm.run("scancel", job.id)
    slurm.wait_until(lambda: job.all_log("asked to stop by SIGTERM"))
    job.go.touch()
    slurm.wait_until(lambda: not slurm.run("squeue", "-h", "--jobs", job.id))
    assert job.state == "CANCELLED"
    assert any("asked to stop: saved at step" in job.logs[node] for node in NODES)
    assert "start 1" not in job.logs["batch"]


def test_a_job_with_a_user_error_is_not_requeued(slurm, leaf_shards, tmp_path):
    job = Job(slurm, tmp_path, leaf_shards, "--export", "ALL,PAUSE=nowhere 0 0")
    slurm.run("scancel", job.id)
    wrong = slurm.submit(
        "--nodes", 2, "launch/slurm.sbatch", "train/train.py", *tiny_run(leaf_shards / "none", tmp_path / "wrong"),
        cwd=tmp_path,
    )  # fmt: skip
    slurm.wait_until(lambda: slurm.field(wrong, "JobState") == "FAILED")
    assert slurm.field(wrong, "ExitCode") == "2:0"
    assert slurm.field(wrong, "Restarts") == "0"
    logs = "".join(log.read_text() for log in (tmp_path / f"slurm-{wrong}").glob("*.log"))
    assert "holds no manifest.json" in logs, "it ended for another reason"


def test_a_job_array_packs_the_same_files_as_one_process(slurm, leaf_images, tmp_path):
    for folder in ("launch", "configs", "train"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    pack = ("msvae", "pack", leaf_images, "--tile", 32, "--out")
    subprocess.run([*map(str, pack), "alone"], cwd=tmp_path, check=True, capture_output=True, timeout=200)
    job = slurm.submit("--array", "1-3", "--nodes", 1, "launch/slurm.sbatch", *pack, "parts", cwd=tmp_path)
    merge = slurm.submit(
        "--dependency", f"afterok:{job}", "--nodes", 1, "launch/slurm.sbatch", *pack, "parts", "--merge", cwd=tmp_path
    )
    slurm.wait_until(lambda: slurm.field(merge, "JobState") == "COMPLETED")
    alone, parts = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "alone", tmp_path / "parts")
    )
    assert alone == parts
    assert any(path.suffix == ".tar" for path in alone)
