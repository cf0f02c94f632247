"""Runs of real processes that write to S3 (moto) and keep nothing on the machine. Some are killed."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.training.checkpoints import check

from ..conftest import ROOT, launch_command, tiny_run
from ..servers import BUCKET, set_credentials

TRAIN = ROOT / "train" / "train.py"
RUN = {
    "train__max_steps": 12,
    "train__checkpoint_every": 2,
    "train__eval_every": 4,
    "data__trace": True,
    "data__flips": True,
}


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """Return the temporary folder of the runs."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def url(moto, monkeypatch, request, scratch) -> str:
    set_credentials(monkeypatch, f"http://{moto[0]}:{moto[1]}")
    return f"s3://{BUCKET}/runs/{request.node.name}"


def objects(url: str) -> dict[str, bytes]:
    client, prefix = boto3.client("s3"), url.removeprefix(f"s3://{BUCKET}/") + "/"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [one["Key"] for page in pages for one in page.get("Contents", [])]
    return {key.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def download(url: str, folder: Path) -> Path:
    for name, content in objects(url).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    name = "diffusion_pytorch_model.safetensors"
    expected, actual = load_file(one / name), load_file(other / name)
    return expected.keys() == actual.keys() and all(np.array_equal(expected[key], actual[key]) for key in expected)


def kill_once_uploaded(command: list[str], url: str, step: int) -> None:
    """Kill the launcher and all ranks as soon as the store holds a checkpoint of `step` or later."""
    run = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while newest(url) < step:
        assert run.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(run)


def kill(run: psutil.Popen) -> None:
    processes = [*run.children(recursive=True), run]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)


def newest(url: str) -> int:
    """Return the step of the newest checkpoint that `latest` in the store names."""
    client, key = boto3.client("s3"), f"{url.removeprefix(f's3://{BUCKET}/')}/checkpoints/latest"
    try:
        latest = client.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()
    except client.exceptions.NoSuchKey:
        return 0
    return int(latest.removeprefix("step-"))


def assert_complete(out: Path, undisturbed: Path) -> None:
    """Check that a run holds the same files and values as one that wrote to a folder, and no others."""
    for folder in ("model", "best", "untrained"):
        assert same_weights(out / folder, undisturbed / folder), folder
        AutoencoderKLMultispectralAdapter.from_pretrained(out / folder)
    for name in ("metrics.jsonl", "validation.jsonl", "trace/rank-00000.jsonl", "trace/rank-00001.jsonl"):
        assert [row["step"] for row in rows(out / name)] == [row["step"] for row in rows(undisturbed / name)], name
    assert [row["loss"] for row in rows(out / "metrics.jsonl")] == [
        row["loss"] for row in rows(undisturbed / "metrics.jsonl")
    ]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    kept = sorted(path.name for path in (undisturbed / "checkpoints").glob("step-*"))
    assert sorted(path.name for path in (out / "checkpoints").glob("step-*")) == kept
    for name in kept:
        check(out / "checkpoints" / name)
    assert (out / "checkpoints" / "latest").read_text() == f"{kept[-1]}\n"
    top = {path.name for path in out.iterdir()}
    assert top == {path.name for path in undisturbed.iterdir()} - {"run.lock", "stacks"}
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


@pytest.fixture(scope="module")
def undisturbed(launch, leaf_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(TRAIN, *tiny_run(leaf_shards, out, **RUN))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_a_killed_run_whose_disk_is_lost_resumes_from_the_store_bit_for_bit(
    launch, leaf_shards, undisturbed, url, impatient, scratch, monkeypatch, tmp_path
):
    arguments = tiny_run(leaf_shards, url, **RUN)
    kill_once_uploaded(launch_command(impatient, *arguments, processes=2), url, step=6)
    last = max(name for name in objects(url) if name.endswith("checksums.json"))
    # as if the run had been killed before the last part of its upload
    boto3.client("s3").delete_object(Bucket=BUCKET, Key=f"{url.removeprefix(f's3://{BUCKET}/')}/{last}")
    (tmp_path / "another machine").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "another machine"))
    done = launch(impatient, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    step = int(last.split("/")[1].removeprefix("step-"))
    assert f"{url}/run.lock belongs to process" in done.stdout
    assert f"warning: {url}/{last.rpartition('/')[0]} lacks checksums.json: its upload was not finished" in done.stdout
    assert f"resumed at step {step - 2}\n" in done.stdout
    assert f"the model is in {url}/model" in done.stdout
    assert_complete(download(url, tmp_path / "downloaded"), undisturbed)
    assert not list((tmp_path / "another machine").glob("msvae-*")), "a finished run leaves no local copy"


@pytest.mark.slow
def test_a_url_in_use_or_without_access_is_refused_in_one_line(launch, leaf_shards, url, impatient, scratch, moto):
    arguments = tiny_run(leaf_shards, url, data__num_workers=0)
    script = (
        "import sys, time\nfrom msvae.training import lock\nlock.RENEW_S = 1.0\n"
        "held = lock.StoreLock(sys.argv[1])\nprint('held', flush=True)\ntime.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE, env=os.environ, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    done = launch(impatient, *arguments)
    holder.kill()
    holder.wait()
    connection = http.client.HTTPConnection(*moto)
    connection.request("POST", "/moto-api/reset-auth", body=b"0")
    connection.getresponse().read()
    try:
        denied = launch(impatient, *arguments)
    finally:
        connection.request("POST", "/moto-api/reset-auth", body=b"1000000")
        connection.getresponse().read()
    for refused, message in (
        (done, f"error: {url} is in use by process {holder.pid} on "),
        (denied, f"error: {url}/run.lock: access denied; check the credentials in the environment"),
    ):
        assert refused.returncode != 0
        lines = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert lines[0].startswith(message)
        assert "step 1" not in refused.stdout
    assert objects(url).keys() == {"run.lock"}, "a refused run leaves nothing"
    assert not list(scratch.glob("msvae-*"))


@pytest.mark.slow
def test_a_run_that_is_killed_or_stopped_at_any_moment_ends_with_the_same_weights(
    leaf_shards, undisturbed, url, impatient, tmp_path
):
    """All ranks are killed, or the launcher gets SIGTERM as on a preempted machine. Each start has an empty disk."""
    rng, ends = np.random.default_rng(0), []
    command = launch_command(impatient, *tiny_run(leaf_shards, url, **RUN), processes=2)
    while not ends or ends[-1] != 0:
        scratch = tmp_path / f"scratch-{len(ends)}"
        scratch.mkdir()
        run = psutil.Popen(
            command, cwd=ROOT, env={**os.environ, "TMPDIR": str(scratch)}, stdout=subprocess.DEVNULL, stderr=None
        )
        metrics, before = None, newest(url)
        while run.poll() is None and (metrics is None or not metrics.stat().st_size):
            metrics = next(scratch.glob("msvae-*/metrics.jsonl"), None)
            time.sleep(0.02)
        # each start makes some progress, so that the run ends
        while run.poll() is None and newest(url) <= before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        if len(ends) % 2 and run.poll() is None:
            run.terminate()
            run.wait()
            assert "run.lock" not in objects(url), "a stopped run releases its lock"
        elif run.poll() is None:
            kill(run)
        ends.append(run.wait())
        assert len(ends) < 20
    assert_complete(download(url, tmp_path / "downloaded"), undisturbed)
