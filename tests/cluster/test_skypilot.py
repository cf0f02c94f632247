"""launch/skypilot.yaml: read by SkyPilot's own parser if it is installed, and its run script on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from msvae.distributed.exit_codes import LOST_RANKS, STOPPED

from ..conftest import ROOT

FILE = ROOT / "launch" / "skypilot.yaml"


@pytest.fixture
def task() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


READ = """
import json, sys
import sky

task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(json.dumps([task.num_nodes, resources.use_spot, resources.job_recovery, task.envs]))
"""


def test_skypilot_parses_the_task(task, tmp_path):
    command = shutil.which("sky")
    if command is None:
        pytest.skip("skypilot's command is not on PATH (pip install skypilot, in an environment of its own)")
    python = Path(command).read_text().splitlines()[0].removeprefix("#!")
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run([python, "-c", READ, FILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    num_nodes, use_spot, recovery, envs = json.loads(done.stdout.splitlines()[-1])
    assert (num_nodes, use_spot) == (2, True)
    assert recovery == task["resources"]["job_recovery"]
    assert envs == task["envs"]


def test_spot_instances_are_replaced_and_runs_that_saved_are_restarted(task):
    recovery = task["resources"]["job_recovery"]
    assert task["resources"]["use_spot"] is True
    assert recovery["recover_on_exit_codes"] == [STOPPED, LOST_RANKS]
    assert task["num_nodes"] == 2
    assert set(task["secrets"].values()) == {None}, "values come from the user's environment"


@pytest.mark.slow
def test_the_run_script_meets_at_the_first_machine_of_skypilots_variables(task, tmp_path):
    """Replace node.sh by a script that prints its arguments; tests/cluster/test_node.py tests node.sh itself."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "node.sh").write_text('printf "%s\\n" "$@"\n')
    variables = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9", "SKYPILOT_NODE_RANK": "1"}
    environment = {**os.environ, **task["envs"], **variables}
    done = subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:5] == ["--nodes", "2", "--at", "10.0.0.7", "train/train.py"]
    assert words[5:] == [
        "--config", "configs/train/sd3.yaml", "--data.train", "s3://leaves/shards/train",
        "--data.val", "s3://leaves/shards/val", "--out", "s3://leaves/runs/first",
    ]  # fmt: skip
    assert all((ROOT / word).is_file() for word in words if word.startswith(("train/", "configs/")))
