"""Failures of disks, checkpoints and data in runs of real processes, as docs/faults.md describes them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from msvae.shards.manifest import Manifest, Shards
from msvae.shards.reader import ShardReader
from msvae.shards.writer import ShardWriter
from msvae.training import checkpoints

from ..conftest import ROOT, disk_of, launch_command, tiny_run
from .interrupted_runs import TRAIN, InterruptedRun, accelerated, alone, errors, rows, steps_kept, weights


@pytest.fixture(scope="module")
def undisturbed(leaf_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = alone(leaf_shards, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Return a disk with space for the weights of a tiny run and two of its checkpoints."""
    with disk_of("32m", tmp_path / "disk") as disk:
        yield disk


def test_a_full_disk_ends_the_run_with_one_line_and_the_run_resumes_when_there_is_space(leaf_shards, disk, tmp_path):
    out = disk / "run"
    overrides = {"data__val": "null", "train__checkpoint_every": 2, "train__max_steps": 8}
    command = accelerated(leaf_shards, out, **overrides)
    full = InterruptedRun(command, out, tmp_path / "full").end()
    assert full.returncode != 0
    # the other rank may report that it lost this one
    (line,) = [line for line in errors(full) if "lost the other ranks" not in line]
    assert line.startswith(f"error: a checkpoint could not be written to {out}/checkpoints: ")
    assert "No space left on device" in line
    assert line in full.cause
    assert "Traceback" not in full.stderr[: full.stderr.index(line)]
    assert steps_kept(out) == [2, 4]
    for step in (2, 4):
        checkpoints.check(out / "checkpoints" / f"step-{step:08d}")
    assert not list((out / "checkpoints").glob(".*"))
    assert rows(out)[-1]["step"] <= 7, "the run stops before the next checkpoint is due"
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
    roomy = InterruptedRun(command, out, tmp_path / "roomy").end()
    assert roomy.returncode == 0, roomy.stderr[-3000:]
    assert "resumed at step 4\n" in roomy.stdout
    assert steps_kept(out) == [4, 6, 8]


def flip(path: Path, fraction: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * fraction)] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "tensors cut short": lambda path: cut(path / checkpoints.TENSORS),
    "a bit of the tensors": lambda path: flip(path / checkpoints.TENSORS, 0.9),
    "a bit of the state": lambda path: flip(path / checkpoints.STATE, 0.5),
    "state cut short": lambda path: cut(path / checkpoints.STATE),
    "a bit of a checksum": lambda path: flip(path / checkpoints.CHECKSUMS, 0.5),
    "checksums cut short": lambda path: cut(path / checkpoints.CHECKSUMS),
    "checksums gone": lambda path: (path / checkpoints.CHECKSUMS).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_of_the_newest_checkpoint_makes_the_previous_one_the_newest_valid(damage, undisturbed, tmp_path):
    out = tmp_path / "run"
    kept = steps_kept(undisturbed)[-2:]
    for step in kept:
        name = f"checkpoints/step-{step:08d}"
        shutil.copytree(undisturbed / name, out / name)
    newest, whole = out / "checkpoints" / f"step-{kept[1]:08d}", out / "checkpoints" / f"step-{kept[0]:08d}"
    assert checkpoints.newest_valid(out) == (newest, [])
    DAMAGES[damage](newest)
    taken, (fault,) = checkpoints.newest_valid(out)
    assert taken == whole
    assert str(newest) in fault


def test_a_damaged_checkpoint_never_replaces_a_valid_one(tmp_path):
    for step in (2, 4, 6):
        checkpoints.write(tmp_path, step, {"model/weight": torch.ones(3)}, {"score": None}, keep=9)
    for step in (2, 6):
        cut(tmp_path / "checkpoints" / f"step-{step:08d}" / checkpoints.STATE)
    checkpoints.write(tmp_path, 5, {"model/weight": torch.ones(3)}, {"score": None}, keep=1)
    taken, faults = checkpoints.newest_valid(tmp_path)
    assert taken is not None
    assert taken.name == "step-00000005"
    assert len(faults) == 1


def test_damaged_checkpoints_are_reported_and_skipped_and_a_run_with_only_damaged_ones_is_refused(
    leaf_shards, undisturbed, tmp_path
):
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    *_, whole, cut_short, flipped = steps_kept(out)
    cut(out / "checkpoints" / f"step-{flipped:08d}" / checkpoints.STATE)
    flip(out / "checkpoints" / f"step-{cut_short:08d}" / checkpoints.TENSORS, 0.5)
    done = alone(leaf_shards, out)
    assert done.returncode == 0, done.stderr[-3000:]
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ") and "damaged" in line]
    assert [f"step-{step:08d}" in line for step, line in zip((flipped, cut_short), warnings, strict=True)] == [
        True
    ] * 2
    assert all(line.endswith("resuming from the checkpoint before it") for line in warnings)
    assert f"resumed at step {whole}, with changed out" in done.stdout
    assert weights(out) == weights(undisturbed)
    for step in steps_kept(out):
        cut(out / "checkpoints" / f"step-{step:08d}" / checkpoints.TENSORS)
    done = alone(leaf_shards, out)
    assert done.returncode == 2
    (line,) = errors(done)
    assert f"all checkpoints of {out} are damaged: " in line
    assert "remove them to start from the beginning" in line


def test_a_checkpoint_whose_loss_is_not_finite_is_never_kept_as_the_best(tmp_path):
    for step, score in ((2, math.nan), (4, 1.0), (6, math.inf), (8, math.nan)):
        checkpoints.write(tmp_path, step, {"model/weight": torch.ones(3)}, {"score": score}, keep=1)
    assert steps_kept(tmp_path) == [4, 8]


def test_a_run_that_diverges_ends_with_one_line_and_keeps_its_best_model(leaf_shards, tmp_path):
    out = tmp_path / "run"
    overrides = {
        "optim__lr": 1000,
        "optim__warmup_steps": 0,
        "optim__max_grad_norm": 0,
        "train__eval_every": 2,
        "train__max_steps": 20,
    }
    done = alone(leaf_shards, out, **overrides)
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = errors(done)
    assert line.startswith("error: the losses or gradients of 10 consecutive steps, up to step ")
    evaluations = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert evaluations[0]["loss"] is not None
    assert evaluations[-1]["loss"] is None
    assert evaluations[-1]["step"] >= 10
    assert "loss nan, leaf PSNR nan dB, spectral angle nan degrees" in done.stdout
    best = load_file(out / "best" / "diffusion_pytorch_model.safetensors")
    assert all(np.isfinite(value).all() for value in best.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's libraries alone need more address space")
def test_a_run_without_enough_memory_ends_with_one_line_that_says_how_to_use_less(leaf_shards, tmp_path):
    out, size = tmp_path / "run", 4096
    arguments = tiny_run(leaf_shards, out, data__val="null", data__global_batch_size=size, data__micro_batch_size=size)
    command = ["prlimit", "--as=8000000000", sys.executable, str(TRAIN), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = errors(done)
    assert line.startswith("error: too little memory (DefaultCPUAllocator: can't allocate memory")
    assert "lower data.micro_batch_size" in line
    assert "Traceback" not in done.stderr


HUGE = 1e30
"""Its square is infinite in float32."""


@pytest.fixture(scope="module")
def poor_shards(leaf_shards, tmp_path_factory) -> tuple[Path, set[str], str]:
    """Return float32 tiles, most without leaf, the keys of those with leaf, and the key of one with huge values."""
    reader = ShardReader(leaf_shards / "train")
    out = tmp_path_factory.mktemp("poor") / "train"
    out.mkdir()
    with_leaf, entries = [], []
    scale, offset = (np.array(values)[:, None, None] for values in (reader.manifest.scale, reader.manifest.offset))
    for shard, entry in enumerate(reader.manifest.shards):
        with ShardWriter(out / entry.name) as writer:
            for row in range(entry.num_samples):
                stored, leaf_mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], bool)
                key = reader.read_into(shard, row, stored, leaf_mask)
                tile = (stored * scale + offset).astype(np.float32)
                if row % 3:
                    leaf_mask[:] = False
                else:
                    with_leaf.append(key)
                if (shard, row) == (0, 0):
                    tile[:, leaf_mask] *= HUGE
                writer.write(key, tile, leaf_mask, {})
        entries.append(writer.entry)
    plain = {"dtype": "float32", "scale": [1.0] * 5, "offset": [0.0] * 5, "shards": Shards.of(entries)}
    Manifest.model_validate({**reader.manifest.model_dump(), **plain}).save(out)
    return out.parent, set(with_leaf), with_leaf[0]


@pytest.mark.parametrize("engine", ["cpu", *(pytest.param(f"zero{n}", marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_steps_without_leaf_or_with_infinite_gradients_change_nothing_on_any_rank_and_are_counted(
    poor_shards, engine, tmp_path
):
    shards, with_leaf, huge = poor_shards
    out = tmp_path / "run"
    overrides = {
        "data__val": "null",
        "data__global_batch_size": 2,
        "data__micro_batch_size": 1,
        "data__trace": True,
        "train__max_steps": 24,
        "train__checkpoint_every": 1,
        "train__keep_checkpoints": 99,
    }
    command = launch_command(TRAIN, processes=2, engine=engine)
    done = InterruptedRun([*command, *tiny_run(shards, out, **overrides)], out, tmp_path / "1").end()
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [(out / "trace" / f"rank-{rank:05d}.jsonl").read_text().splitlines() for rank in range(2)]
    keys = [{key for line in lines for key in json.loads(line)["keys"]} for lines in zip(*seen, strict=True)]
    empty = [step for step, of_step in enumerate(keys, start=1) if not of_step & with_leaf]
    infinite = [step for step, of_step in enumerate(keys, start=1) if huge in of_step]
    assert empty
    assert infinite
    skipped = sorted(empty + infinite)
    assert [row["skipped_steps"] for row in rows(out)] == [sum(s <= step for s in skipped) for step in range(1, 25)]
    assert "had no leaf value to compare with and were skipped" in done.stdout
    assert "gradients were not finite and changed nothing" in done.stdout
    saved = [load_file(path / checkpoints.TENSORS) for path in sorted((out / "checkpoints").glob("step-*"))]
    for step, (before, after) in enumerate(pairwise(saved), start=2):
        same = all(np.array_equal(before[name], after[name]) for name in before)
        assert same == (step in skipped), step

    stopped = tmp_path / "stopped"
    limit = {**overrides, "train__max_nonfinite_steps": 1, "train__max_steps": infinite[0] + 1}
    done = InterruptedRun([*command, *tiny_run(shards, stopped, **limit)], stopped, tmp_path / "2").end()
    assert done.returncode != 0
    line = errors(done)[0]
    assert line.startswith(
        f"error: the losses or gradients of 1 consecutive step, up to step {infinite[0]}, were not finite"
    )
    assert all(key in line for key in keys[infinite[0] - 1])


@pytest.mark.slow
def test_early_stopping_ends_all_ranks_at_the_same_step_and_a_restart_trains_no_further(leaf_shards, tmp_path):
    out = tmp_path / "run"
    # weights that never change never improve
    overrides = {"optim__lr": 0, "train__eval_every": 1, "train__patience": 2, "data__trace": True}
    done = InterruptedRun(accelerated(leaf_shards, out, **overrides), out, tmp_path / "1").end()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished at step 2" in done.stdout
    assert steps_kept(out) == [2]
    seen = {path.read_text().count("\n") for path in (out / "trace").iterdir()}
    assert len(seen) == 1
    names = ("metrics.jsonl", "validation.jsonl", "model/diffusion_pytorch_model.safetensors", "model/config.json")
    before = [(out / name).read_bytes() for name in names]
    again = alone(leaf_shards, out, **overrides)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "nothing left to train after step 2" in again.stdout
    assert [(out / name).read_bytes() for name in names] == before
