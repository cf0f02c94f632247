"""Mixed precision as the launcher chooses it. test_launch_configurations.py tests bf16 under each engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..conftest import ROOT, tiny_run

TRAIN = ROOT / "train" / "train.py"
STEPS = 20


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu", "zero1", "zero2", "zero3"])
def test_fp16_trains_skips_steps_that_overflow_and_resumes_to_the_same_bits(launch, leaf_shards, tmp_path, engine):
    script = tmp_path / "train_with_a_large_first_scale.py"
    script.write_text(
        "import msvae.distributed.precision as precision\n"
        "precision.FIRST_SCALE = 2.0**20\n"
        f"exec(open({str(TRAIN)!r}).read())\n"
    )
    options = {"data__val": "null", "optim__lr": 2e-3, "train__max_steps": STEPS, "train__checkpoint_every": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = tiny_run(leaf_shards, whole, **options, train__keep_checkpoints=99)
    done = launch(script, *arguments, processes=2, engine=engine, precision="fp16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gradients were not finite and changed nothing" in " ".join(done.stdout.split())
    logged = rows(whole)
    skipped = [row["skipped_steps"] for row in logged]
    assert 2 <= skipped[-1] <= 8
    first = next(number for number, row in enumerate(logged) if row["grad_norm"] is not None)
    losses = [row["loss"] for row in logged[first:]]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    for step in range(2, STEPS + 1, 2):
        state = json.loads((checkpoint(whole, step) / "state.json").read_text())
        assert state["loss_scale"]["value"] == 2.0**20 / 2 ** skipped[step - 1], (
            "the scale is halved after every overflow"
        )
        assert state["updates"] == step - skipped[step - 1]
    shutil.copytree(checkpoint(whole, 2), checkpoint(resumed, 2))
    done = launch(TRAIN, *tiny_run(leaf_shards, resumed, **options), processes=2, engine=engine, precision="fp16")
    assert done.returncode == 0, done.stderr[-3000:]
    expected, actual = (load_file(checkpoint(out, STEPS) / "tensors.safetensors") for out in (whole, resumed))
    assert {tensor.dtype for tensor in expected.values()} == {np.dtype(np.float32)}
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)
    assert rows(resumed)[-1]["skipped_steps"] == skipped[-1]
