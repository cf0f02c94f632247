"""Real runs with different placements, loss terms and learning rates, and with data that has errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from msvae.shards.manifest import Manifest, Shards
from msvae.shards.reader import ShardReader
from msvae.shards.writer import ShardWriter

from ..conftest import ROOT, tiny_run

TRAIN, EVALUATE = ROOT / "train" / "train.py", ROOT / "train" / "evaluate.py"


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def shards_with_nan(leaf_shards, tmp_path_factory) -> Path:
    """Return the training split as float32 reflectance, in which one leaf pixel in a hundred is NaN in one band."""
    reader = ShardReader(leaf_shards / "train")
    out = tmp_path_factory.mktemp("nan") / "train"
    out.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    scale, offset = (np.array(values)[:, None, None] for values in (reader.manifest.scale, reader.manifest.offset))
    for shard, entry in enumerate(reader.manifest.shards):
        with ShardWriter(out / entry.name) as writer:
            for row in range(entry.num_samples):
                stored = np.empty(reader.tile_shape, reader.dtype)
                leaf_mask = np.empty(reader.tile_shape[1:], bool)
                key = reader.read_into(shard, row, stored, leaf_mask)
                tile = (stored * scale + offset).astype(np.float32)
                tile[2, leaf_mask & (rng.random(leaf_mask.shape) < 0.01)] = np.nan
                writer.write(key, tile, leaf_mask, {})
        entries.append(writer.entry)
    plain = {"dtype": "float32", "scale": [1.0] * 5, "offset": [0.0] * 5, "shards": Shards.of(entries)}
    Manifest.model_validate({**reader.manifest.model_dump(), **plain}).save(out)
    return out.parent


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["both", "input", "output"])
def test_every_adapter_placement_can_be_trained_and_evaluated(launch, leaf_shards, placement, tmp_path):
    out = tmp_path / "run"
    done = launch(TRAIN, *tiny_run(leaf_shards, out, model__adapter_placement=placement), processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_file(out / name / "diffusion_pytorch_model.safetensors") for name in ("untrained", "model"))
    assert all(not np.array_equal(before[name], after[name]) for name in before if name.endswith("weight"))
    arguments = ("--model", out / "model", "--data", leaf_shards / "val", "--out", tmp_path / "report")
    evaluated = launch(EVALUATE, *arguments, processes=1)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    numbers = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert math.isfinite(numbers["model"]["psnr_db"])


@pytest.mark.slow
def test_frozen_parts_do_not_change_and_have_no_optimizer_state(launch, leaf_shards, tmp_path):
    out = tmp_path / "run"
    overrides = {"model__train_backbone": "decoder", "optim__backbone_lr": 0.0, "model__adapter_placement": "output"}
    done = launch(TRAIN, *tiny_run(leaf_shards, out, optim__ema_decay=0.0, **overrides), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning: `tiny` has no trained weights" in done.stdout
    assert {(row["lr"] > 0, row["lr_backbone"]) for row in metrics(out)} <= {(True, 0.0), (False, 0.0)}
    before, after = (load_file(out / name / "diffusion_pytorch_model.safetensors") for name in ("untrained", "model"))
    changed = {name.split(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"output_adapter", "output_attention"}, "the learning rate of the backbone is 0"
    state = load_file(out / "checkpoints" / "step-00000004" / "tensors.safetensors")
    kept = {name.split("/")[-1].split(".")[0] for name in state}
    assert kept == {"output_adapter", "output_attention", "decoder"}


def test_every_term_of_the_loss_can_be_trained_and_is_logged(launch, leaf_shards, tmp_path):
    terms = ("l1", "huber", "cosine", "signature", "range", "index")
    out = tmp_path / "run"
    weights = {f"loss__{term}_weight": 0.1 for term in terms} | {"loss__mse_weight": 0, "loss__sam_weight": 0}
    done = launch(TRAIN, *tiny_run(leaf_shards, out, **weights), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in metrics(out):
        assert row.keys() >= {*terms, "kl"}
        assert not row.keys() & {"mse", "sam", "mse_per_channel"}, "a term at 0 is not computed"
        assert row["loss"] == pytest.approx(sum(0.1 * row[term] for term in terms) + 1e-6 * row["kl"])
    validation = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    for row in validation:
        assert row["loss"] == pytest.approx(sum(0.1 * row[term] for term in terms))
    importance = json.loads((out / "model" / "config.json").read_text())["band_importance"]
    assert importance == list(validation[-1]["band_importance"].values())


def test_leaf_values_that_are_not_finite_are_left_out_counted_and_reported(launch, shards_with_nan, tmp_path):
    out = tmp_path / "run"
    # checkpoints check the data, too, because they do not store unchecked counts
    checks = {"data__check_every": 100, "train__checkpoint_every": 2}
    overrides = {
        "data__val": "null",
        "data__max_nonfinite_share": 0.1,
        "data__low_coverage": 0.99,
        "data__high_coverage": 1,
        **checks,
    }
    done = launch(TRAIN, *tiny_run(shards_with_nan, out, **overrides), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(out)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert 0.0005 < sum(row["nonfinite_elements"] / row["valid_pixels"] / 5 for row in rows) / len(rows) < 0.005
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert len([line for line in warnings if "are not finite and were left out" in line]) == 3, "after step 1, 2 and 4"
    first, second, third = [line for line in warnings if "low coverage" in line]
    assert "1 of 1 global batch at step 1" in first
    assert "1 of 1 global batch at step 2" in second
    assert "2 of 2 global batches from step 3 to 4" in third
    reader = ShardReader(shards_with_nan / "train")
    keys = {reader.key(shard, row) for shard, rows in enumerate(reader.samples_per_shard) for row in range(rows)}
    named = first.split("tiles are ")[1].split(", ")
    assert len(named) == 3
    assert {name.split(" ")[0] for name in named} < keys


@pytest.mark.slow
def test_too_many_values_that_are_not_finite_stop_the_run(launch, shards_with_nan, tmp_path):
    arguments = tiny_run(shards_with_nan, tmp_path / "run", data__val="null", data__max_nonfinite_share=1e-4)
    done = launch(TRAIN, *arguments, processes=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "leaf values at step 1 are not finite, more than data.max_nonfinite_share 0.0001 allows" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes"), [("cpu", 1), ("cpu", 2), ("zero2", 2)])
def test_compiled_training_takes_the_same_steps(launch, leaf_shards, tmp_path, engine, processes):
    for name, compiled in (("eager", False), ("compiled", True)):
        arguments = tiny_run(leaf_shards, tmp_path / name, train__compile=compiled, data__val="null")
        done = launch(TRAIN, *arguments, processes=processes, engine=engine)
        assert done.returncode == 0, done.stderr[-3000:]
    for eager, compiled in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        for number in ("loss", "sam", "grad_norm"):
            assert compiled[number] == pytest.approx(eager[number], rel=1e-3), number


@pytest.mark.slow
def test_a_resumed_run_drops_results_of_other_loss_weights_and_splits(launch, leaf_shards, tmp_path):
    out = tmp_path / "run"
    assert launch(TRAIN, *tiny_run(leaf_shards, out), processes=1).returncode == 0
    best = json.loads((out / "validation.jsonl").read_text().splitlines()[-1])["loss"]
    changed = tiny_run(leaf_shards, out, loss__sam_weight=100, train__max_steps=5)
    done = launch(TRAIN, *changed, processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = "resumed at step 4, with changed loss.sam_weight 1.0 -> 100.0, train.max_steps 4 -> 5"
    assert expected in " ".join(done.stdout.split())
    last = json.loads((out / "validation.jsonl").read_text().splitlines()[-1])
    assert last["loss"] > 2 * best, "a loss with other weights"
    about = json.loads((out / "best" / "config.json").read_text())
    assert about["metrics"]["psnr_db"] == last["psnr_db"], "the best with these weights"
    without_val = tiny_run(leaf_shards, out, data__val="null", train__max_steps=6)
    assert launch(TRAIN, *without_val, processes=1).returncode == 0
    about = json.loads((out / "model" / "config.json").read_text())
    assert (about["metrics"], about["band_importance"]) == (None, None)
