"""Every file of configs/accelerate/, launched with the command in its comment. bf16 is used on a CPU, too."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from ..conftest import ROOT, launch_command, tiny_run

CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
TRAIN = ROOT / "train" / "train.py"
STEPS = 6


def head(config: Path) -> tuple[list[str], str]:
    """Return the comment lines of a file, and the command in them."""
    lines = [line.removeprefix("# ") for line in config.read_text().splitlines() if line.startswith("#")]
    (command,) = [line for line in lines if line.startswith("accelerate launch ")]
    return lines, command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_together(commands: list[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    done = []
    for process in running:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, errors))
    return done


@pytest.fixture(scope="module")
def first_loss_in_float32(launch, leaf_shards, tmp_path_factory) -> float:
    out = tmp_path_factory.mktemp("float32") / "run"
    overrides = {"data__val": "null", "data__global_batch_size": 8, "train__max_steps": 1}
    assert launch(TRAIN, *tiny_run(leaf_shards, out, **overrides), processes=1).returncode == 0
    return float(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == "multi_node" else [pytest.mark.slow])
        for path in CONFIGS
    ],
)
def test_each_configuration_trains_with_the_command_that_it_names(
    leaf_shards, first_loss_in_float32, tmp_path, config
):
    lines, command = head(config)
    assert 2 <= len(lines) <= 4
    assert f"--config_file configs/accelerate/{config.name} " in command
    values, out = yaml.safe_load(config.read_text()), tmp_path / "run"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    words = command.replace("HOST", "127.0.0.1").replace("num_processes 16", "num_processes 2").split()[2:]
    at = words.index("train/train.py")
    machines = values["num_machines"]
    words[at:at] = ["--main_process_port", str(free_port())] if machines > 1 else []
    options = {"data__val": "null", "train__max_steps": STEPS, "train__checkpoint_every": 0, "optim__lr": 2e-3}
    options["model__sample_posterior"] = True
    words += tiny_run(leaf_shards, out, **options)
    commands = [[*launcher, *(str(rank) if word == "R" else word for word in words)] for rank in range(machines)]
    done = run_together(commands)
    assert "finished at step 6" in done[0].stdout
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    apart = abs(rows[0]["loss"] / first_loss_in_float32 - 1)
    assert (1e-6 < apart < 1e-2) if values["mixed_precision"] == "bf16" else apart < 1e-6
    saved = load_file(out / "checkpoints" / f"step-{STEPS:08d}" / "tensors.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"type": "Adam", "params": {"lr": 1}}}, "sets optimizer, expected only its zero_optimization"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "sets scheduler, expected only its zero_optimization"),
        (
            {"bf16": {"enabled": True}},
            "enables bf16, expected float32 weights; remove it and pass `--mixed_precision bf16`",
        ),
        ({"zero_optimization": {"stage": 0}}, "zero stage is 0, expected 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            "offload_optimizer has the device nvme, expected cpu or none",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "sets zero_optimization.zero_quantized_weights",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
            "sets zero_optimization.offload_optimizer.ratio",
        ),
    ],
)
def test_deepspeed_settings_that_would_change_the_training_are_refused(settings, message):
    from msvae.distributed.deepspeed_settings import check_deepspeed_config

    with pytest.raises(ValueError, match=message):
        check_deepspeed_config({"zero_optimization": {"stage": 2}, **settings})


@pytest.mark.parametrize("refused", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_deepspeed_file_may_tune_zero_but_not_what_the_run_sets(leaf_shards, tmp_path, refused):
    settings = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000},
        "gradient_clipping": 1e-9,
        "train_batch_size": 7,
        "gradient_accumulation_steps": 5,
        **({"optimizer": {"type": "Adam", "params": {"lr": 1}}} if refused else {}),
    }
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    config = tmp_path / "zero.yaml"
    values = yaml.safe_load((ROOT / "configs" / "accelerate" / "zero2.yaml").read_text())
    values["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "deepspeed.json")}
    del values["mixed_precision"]
    config.write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    command = launch_command(TRAIN, *tiny_run(leaf_shards, out, data__val="null", train__max_steps=2), processes=2)
    command[command.index("--config_file") + 1] = str(config)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if refused:
        assert done.returncode != 0
        assert errors == [line for line in errors if "sets optimizer, expected only its zero_optimization" in line]
        assert len(errors) == 1
        assert not out.exists()
    else:
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_compiling_under_zero3_is_refused(launch, leaf_shards, tmp_path):
    arguments = tiny_run(leaf_shards, tmp_path / "run", train__compile=True)
    done = launch(TRAIN, *arguments, processes=1, engine="zero3")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "train.compile is true under ZeRO 3" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU DeepSpeed may compile")
def test_on_a_cpu_deepspeed_needs_no_compiler_and_prints_nothing(leaf_shards, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("env", "uname", "sh"):
        (programs / name).symlink_to(str(shutil.which(name)))
    environment = {**os.environ, "PATH": str(programs), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    arguments = tiny_run(leaf_shards, tmp_path / "run", data__val="null", train__max_steps=2)
    command = launch_command(TRAIN, *arguments, processes=2, engine="zero3")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "extensions").exists()
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    # the launcher prints its own message before training can prevent it
    said = [line for line in said if "Setting accelerator to CPU" not in line]
    assert [line.split()[0] for line in said] == ["step", "step", "finished"], said
