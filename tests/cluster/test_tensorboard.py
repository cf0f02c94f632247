"""TensorBoard follows a run on an object store while it trains, and by default only this machine can reach it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from msvae.training.board import Board

from ..servers import BUCKET, set_credentials, upload
from .slurm import free_ports

TIMEOUT_S = 120


def ask(port: int, path: str) -> Any:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/{path}", timeout=5) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError):
        return None


def losses(port: int) -> list[list[float]]:
    return ask(port, "plugin/scalars/scalars?run=.&tag=train%2Floss") or []


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_tensorboard_follows_a_run_on_a_store_and_listens_only_on_this_machine(moto, monkeypatch, tmp_path):
    """The command of docs/machines.md."""
    set_credentials(monkeypatch, f"http://{moto[0]}:{moto[1]}")
    (port,) = free_ports(1)
    board = Board(tmp_path / "run" / "tensorboard", -1)

    def log(step: int) -> None:
        board.row("train", {"step": step, "loss": 1 / step})
        board.flush()
        upload(f"http://{moto[0]}:{moto[1]}", tmp_path / "run", "runs/followed")

    log(1)
    command = [
        str(Path(sys.executable).with_name("tensorboard")),
        "--logdir",
        f"s3://{BUCKET}/runs/followed/tensorboard",
    ]
    command += ["--reload_interval", "1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log_file:
        server = psutil.Popen(command, stdout=log_file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: len(losses(port)) == 1)
        log(2)
        wait_until(lambda: [step for _, step, _ in losses(port)] == [1, 2])
        listening = {one.laddr.ip for one in server.net_connections() if one.status == psutil.CONN_LISTEN}
        assert listening <= {"127.0.0.1", "::1"}
    finally:
        server.kill()
        server.wait()
        board.close()
