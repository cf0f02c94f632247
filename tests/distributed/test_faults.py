"""Failures of a cluster in whole runs of real processes, one after another, as docs/faults.md describes them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from ..conftest import tiny_run
from .interrupted_runs import (
    RUN,
    Ended,
    InterruptedRun,
    accelerated,
    alone,
    errors,
    logged,
    rows,
    steps_kept,
    torchrun,
    weights,
)

LOCAL = "127.0.0.1"


@pytest.fixture(scope="module")
def undisturbed(leaf_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = InterruptedRun(accelerated(leaf_shards, folder / "run"), folder / "run", folder).end()
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder / "run"


class InterruptedStarts(NamedTuple):
    """Output and files of one run that was started several times."""

    out: Path
    after_lost_rank: Ended
    partial: list[str]
    after_signals: Ended
    saved_after_signals: list[int]
    leftovers: list[str]
    after_launchers_signal: Ended
    saved_after_launchers_signal: list[int]
    at_the_end: Ended


@pytest.fixture(scope="module")
def interrupted(leaf_shards, tmp_path_factory) -> InterruptedStarts:
    """Return a run that is started five times.

    It loses one rank, loses all ranks, is asked to stop, is asked to stop through its launcher, and finishes.
    """
    folder = tmp_path_factory.mktemp("interrupted")
    out = folder / "run"
    command = accelerated(leaf_shards, out)

    run = InterruptedRun(command, out, folder / "1", pause="evaluation 1 4")
    run.wait_until(run.paused.exists)
    run.ranks()[1].kill()
    after_lost_rank = run.end(60)

    run = InterruptedRun(command, out, folder / "2", pause="checkpoint 0 6")
    run.wait_until(run.paused.exists)
    run.kill_all()
    partial = [path.name for path in (out / "checkpoints").glob(".*")]

    run = InterruptedRun(command, out, folder / "3")
    run.wait_for_step(8)  # it stops at step 10 or soon after, where no checkpoint is due
    leftovers = [path.name for path in (out / "checkpoints").glob(".*")]
    _, second = run.ranks()
    second.send_signal(signal.SIGUSR1)
    after_signals, saved_after_signals = run.end(), steps_kept(out)

    run = InterruptedRun(command, out, folder / "4")
    run.wait_for_step(saved_after_signals[-1] + 1)
    run.launcher.send_signal(signal.SIGTERM)
    after_launchers_signal, saved_after_launchers_signal = run.end(), steps_kept(out)

    at_the_end = InterruptedRun(command, out, folder / "5").end()
    return InterruptedStarts(
        out, after_lost_rank, partial, after_signals, saved_after_signals, leftovers,
        after_launchers_signal, saved_after_launchers_signal, at_the_end,
    )  # fmt: skip


def test_after_a_rank_is_killed_the_others_end_within_seconds_and_the_summary_names_it(interrupted):
    ended = interrupted.after_lost_rank
    assert ended.returncode != 0
    (line,) = errors(ended)
    assert line.startswith("error: lost the other ranks in TileColumns.all_reduce (")
    assert "rank      : 1" in ended.cause
    assert "Signal 9 (SIGKILL)" in ended.cause
    before_launcher = ended.stderr[: ended.stderr.index(line)]
    assert "Traceback" not in before_launcher, "the rank that lost another one prints one line"


def test_a_partial_checkpoint_is_ignored_and_removed(interrupted):
    assert interrupted.partial == [".step-00000006.partial"]
    assert interrupted.leftovers == []
    assert "resumed at step 3\n" in interrupted.after_signals.stdout


def test_after_a_signal_to_one_rank_all_ranks_save_and_exit_with_75(interrupted):
    ended = interrupted.after_signals
    assert ended.returncode == 1, "the exit code of the launcher"
    assert ended.stderr.count("exitcode  : 75") == 2
    stopped_at = interrupted.saved_after_signals[-1]
    assert 9 <= stopped_at < 16
    assert f"asked to stop: saved at step {stopped_at}; run the same command again to continue" in ended.stdout
    assert not errors(ended)


def test_after_a_signal_to_the_launcher_all_ranks_save(interrupted):
    stopped_at = interrupted.saved_after_launchers_signal[-1]
    assert interrupted.saved_after_signals[-1] < stopped_at < 16
    assert interrupted.after_launchers_signal.returncode == 1
    assert interrupted.after_launchers_signal.stderr.rstrip().endswith("got signal: 15")
    assert f"asked to stop: saved at step {stopped_at}" in interrupted.after_launchers_signal.stdout
    assert f"resumed at step {stopped_at}\n" in interrupted.at_the_end.stdout


def test_a_run_with_several_failures_ends_with_the_weights_of_an_undisturbed_run(interrupted, undisturbed):
    assert interrupted.at_the_end.returncode == 0, interrupted.at_the_end.stderr[-3000:]
    for folder in ("model", "best", "untrained"):
        assert weights(interrupted.out, folder) == weights(undisturbed, folder), folder
    losses = [[(row["step"], row["loss"]) for row in rows(out)] for out in (interrupted.out, undisturbed)]
    assert losses[0] == losses[1]
    assert not [path for path in interrupted.out.rglob(".*")]


def test_a_second_signal_ends_a_rank_immediately_unless_it_was_forwarded():
    waits = (
        "import time; from msvae.training.stop import StopRequest; StopRequest(); print(1, flush=True); time.sleep(90)"
    )
    with subprocess.Popen([sys.executable, "-c", waits], stdout=subprocess.PIPE) as rank:
        rank.stdout.read(1)
        rank.send_signal(signal.SIGUSR1)
        time.sleep(1.5)
        rank.send_signal(signal.SIGUSR2)
        time.sleep(0.5)
        assert rank.poll() is None
        rank.send_signal(signal.SIGTERM)
        assert rank.wait() == 128 + signal.SIGTERM


def test_a_second_signal_immediately_ends_a_rank_that_waits_for_another(tmp_path):
    script = (
        "import sys, time, torch; import torch.distributed as dist\n"
        "from msvae.training.stop import StopRequest\n"
        "rank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)\n"
        "dist.all_reduce(torch.ones(1)); StopRequest(); print(1, flush=True)\n"
        "time.sleep(90 * rank); dist.all_reduce(torch.ones(1))\n"
    )
    command = [sys.executable, "-c", script]
    waiting, late = (
        subprocess.Popen([*command, str(rank), tmp_path / "store"], stdout=subprocess.PIPE) for rank in range(2)
    )
    try:
        for rank in (waiting, late):
            rank.stdout.read(1)
        time.sleep(1)
        waiting.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert waiting.poll() is None
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(30) == 128 + signal.SIGTERM
        assert late.poll() is None
    finally:
        for rank in (waiting, late):
            rank.kill()


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_is_refused_and_the_first_continues_without_its_launcher(
    leaf_shards, undisturbed, tmp_path
):
    out = tmp_path / "run"
    first = InterruptedRun(accelerated(leaf_shards, out), out, tmp_path / "first", pause="evaluation 1 4")
    first.wait_until(first.paused.exists)
    ranks = first.ranks()
    first.launcher.kill()
    second = alone(leaf_shards, out)
    assert second.returncode == 2
    (line,) = errors(second)
    assert f"{out} is in use by process {ranks[0].pid} on {socket.gethostname()}; wait until it ends" in line
    first.go.touch()
    assert not psutil.wait_procs(ranks, 240)[1]
    assert weights(out) == weights(undisturbed)
    assert logged(out) == list(range(1, 17))


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank_and_the_run_resumes(leaf_shards, undisturbed, tmp_path):
    """torchrun is used without accelerate."""
    out = tmp_path / "run"
    command = torchrun("--standalone", "--nproc_per_node", 2, "--max-restarts", 2)
    run = InterruptedRun([*command, *tiny_run(leaf_shards, out, **RUN)], out, tmp_path, pause="evaluation 0 8")
    run.wait_until(run.paused.exists)
    run.ranks()[1].kill()
    ended = run.end()
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "resumed at step 6\n" in ended.stdout
    assert weights(out) == weights(undisturbed)


@pytest.mark.slow
def test_a_run_that_lost_a_machine_resumes_on_the_others(leaf_shards, undisturbed, tmp_path):
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind((LOCAL, 0))
        endpoint = f"{LOCAL}:{free.getsockname()[1]}"
    meeting = ("--rdzv-backend", "c10d", "--rdzv-id", "leaves", "--rdzv-endpoint", endpoint)
    quick = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    # the machine at the address of the rendezvous is the one that stays
    stays_command, leaves_command = (
        [
            *torchrun("--nnodes", "1:2", "--nproc_per_node", 1, "--max-restarts", 2, *meeting, "--local-addr", LOCAL,
                      f"--rdzv-conf={quick},is_host={is_host}"),
            *tiny_run(leaf_shards, out, **RUN),
        ]
        for is_host in (1, 0)
    )  # fmt: skip
    stays = InterruptedRun(stays_command, out, tmp_path / "stays", pause="evaluation 0 8")
    leaves = InterruptedRun(leaves_command, out, tmp_path / "leaves")
    stays.wait_until(stays.paused.exists)
    assert len(leaves.ranks()) == 1, "both machines take part"
    leaves.kill_all()
    stays.go.touch()
    ended = stays.end()
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "resumed at step 6\n" in ended.stdout
    actual, expected = (load_file(run / "model" / "diffusion_pytorch_model.safetensors") for run in (out, undisturbed))
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu", "zero2"])
def test_ranks_that_wait_too_long_for_another_write_their_stacks_and_end_with_one_line(leaf_shards, engine, tmp_path):
    out = tmp_path / "run"
    command = accelerated(leaf_shards, out, engine, train__timeout_s=20)
    run = InterruptedRun(command, out, tmp_path)
    run.wait_for_step(2)
    waiting, stopped = run.ranks()
    stopped.suspend()
    ended = run.end()
    assert not waiting.is_running()
    assert not stopped.is_running(), "the launcher kills it after 30 s"
    assert ended.returncode != 0
    (line,) = errors(ended)
    assert line.startswith("error: the other ranks did not reach ")
    assert "within train.timeout_s (Timed out waiting 20000ms" in line
    assert "stacks/" in line
    assert line in ended.cause
    stacks = (out / "stacks" / "rank-00000.txt").read_text()
    assert "msvae/training/trainer.py" in stacks
