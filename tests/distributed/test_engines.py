"""Any engine resumes a checkpoint of any other engine, and each engine resumes its own to the same bits."""

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
RUN = {
    "data__val": "null",
    "data__global_batch_size": 12,
    "data__flips": True,
    "optim__backbone_lr": 5e-4,
    "optim__warmup_steps": 7,
    "train__max_steps": STEPS,
    "train__checkpoint_every": 5,
    "train__keep_checkpoints": 9,
}
"""An epoch has three to four steps, so checkpoints are in the middle of one. The learning rate rises and falls."""


def tensors(run: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "tensors.safetensors")


def train(launch, shards: Path, out: Path, engine: str, processes: int, start: tuple[Path, int] | None = None) -> Path:
    """Train from the beginning, or from a step of another run, to the end."""
    if start is not None:
        name = f"step-{start[1]:08d}"
        shutil.copytree(start[0] / "checkpoints" / name, out / "checkpoints" / name)
    micro = 2 if processes == 3 else 3
    done = launch(
        TRAIN, *tiny_run(shards, out, **RUN, data__micro_batch_size=micro), processes=processes, engine=engine
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert start is None or f"resumed at step {start[1]}" in done.stdout
    return out


def distance(run: Path, reference: Path) -> dict[str, float]:
    """Return the distance of the weights, and of their average, relative to the norm."""
    actual, expected = tensors(run), tensors(reference)
    assert actual.keys() == expected.keys()
    found = {}
    for kind in ("model", "average"):
        names = [name for name in expected if name.startswith(f"{kind}/")]
        assert len(names) > 50
        apart = sum(float(np.square(actual[n].astype(np.float64) - expected[n]).sum()) for n in names)
        found[kind] = (apart / sum(float(np.square(expected[n].astype(np.float64)).sum()) for n in names)) ** 0.5
    return found


def distance_to_average(run: Path) -> float:
    """Return the distance of the last weights from their average, relative to the norm of the weights."""
    found = tensors(run)
    weights = {name: value.astype(np.float64) for name, value in found.items() if name.startswith("model/")}
    apart = sum(np.square(value - found[name.replace("model/", "average/")]).sum() for name, value in weights.items())
    return float((apart / sum(np.square(value).sum() for value in weights.values())) ** 0.5)


@pytest.fixture(scope="module")
def undisturbed(launch, leaf_shards, tmp_path_factory) -> Path:
    return train(launch, leaf_shards, tmp_path_factory.mktemp("engines") / "zero2", "zero2", 3)


@pytest.fixture(scope="module")
def under_zero3(launch, leaf_shards, undisturbed, tmp_path_factory) -> Path:
    """Return a run that is resumed twice: ZeRO 2 on three ranks, then DDP on one rank, then ZeRO 3 on four ranks."""
    folder = tmp_path_factory.mktemp("exchange")
    alone = train(launch, leaf_shards, folder / "cpu", "cpu", 1, start=(undisturbed, 5))
    assert max(distance(alone, undisturbed).values()) <= 1e-5
    return train(launch, leaf_shards, folder / "zero3", "zero3", 4, start=(alone, 10))


def test_a_run_resumes_under_any_engine_and_number_of_ranks(launch, leaf_shards, undisturbed, under_zero3, tmp_path):
    assert max(distance(under_zero3, undisturbed).values()) <= 1e-5
    last = train(launch, leaf_shards, tmp_path / "zero1", "zero1", 2, start=(under_zero3, 15))
    assert max(distance(last, undisturbed).values()) <= 1e-5
    for run in (undisturbed, under_zero3, last):
        logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert logged["ema_distance"] == pytest.approx(distance_to_average(run), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "processes", "step", "whole"), [("zero2", 3, 5, "undisturbed"), ("zero3", 4, 15, "under_zero3")]
)
def test_under_zero_a_run_resumes_to_the_same_bits(
    launch, leaf_shards, tmp_path, request, engine, processes, step, whole
):
    """Weights, moments and average are compared, in the middle of an epoch and of the schedule."""
    reference = request.getfixturevalue(whole)
    out = train(launch, leaf_shards, tmp_path / "resumed", engine, processes, start=(reference, step))
    expected, actual = tensors(reference), tensors(out)
    assert expected.keys() == actual.keys()
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
def test_checkpoints_hold_the_trained_weights_and_not_the_frozen_backbone(launch, leaf_shards, tmp_path):
    out = tmp_path / "run"
    overrides = {"model__train_backbone": "none", "data__val": "null", "train__max_steps": 2}
    arguments = tiny_run(leaf_shards, out, **overrides, train__checkpoint_every=1)
    done = launch(TRAIN, *arguments, processes=2, engine="zero3")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_file(out / name / "diffusion_pytorch_model.safetensors") for name in ("untrained", "model"))
    frozen = {name for name in before if name.startswith(("encoder.", "decoder."))}
    assert all(np.array_equal(before[name], after[name]) for name in frozen)
    for step in (1, 2):
        saved = tensors(out, step)
        assert not frozen & {name.split("/", 1)[1] for name in saved}
        assert {name.split("/")[0] for name in saved} == {"model", "exp_avg", "exp_avg_sq", "average"}
        folder = out / "checkpoints" / f"step-{step:08d}"
        on_disk = sum(file.stat().st_size for file in folder.iterdir())
        held = sum(tensor.nbytes for tensor in saved.values())
        assert on_disk < held + 20_000, "names and the state of the run"
    trained = sum(before[name].nbytes for name in before.keys() - frozen)
    assert held == pytest.approx(4 * trained, rel=0.01)
    assert held < 0.1 * sum(before[name].nbytes for name in frozen)
    assert json.loads((folder / "state.json").read_text())["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes"), [("zero2", 10), ("zero3", 16)])
def test_ranks_that_hold_only_padding_take_part_in_training(launch, leaf_shards, tmp_path, engine, processes):
    """DeepSpeed pads the last shard: here of 140 numbers, as with default adapters on a hundred ranks."""
    few = {
        "model__train_backbone": "none",
        "model__adapter_width": 1,
        "model__adapter_placement": "output",
        "model__adapter_form": "convolution",
        "model__adapter_init": "random",
        "model__use_spectral_attention": False,
        "data__val": "null",
        "data__global_batch_size": processes,
        "data__micro_batch_size": 1,
        "train__max_steps": 3,
        "train__checkpoint_every": 1,
    }
    for name, number in (("cpu", 1), (engine, processes)):
        done = launch(TRAIN, *tiny_run(leaf_shards, tmp_path / name, **few), processes=number, engine=name)
        assert done.returncode == 0, done.stderr[-3000:]
    actual, expected = tensors(tmp_path / engine, 3), tensors(tmp_path / "cpu", 3)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-7, err_msg=name)
