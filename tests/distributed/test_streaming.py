"""Real runs on shards in an object store, and on damaged shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msvae.training.checkpoints import load_state

from ..conftest import ROOT, tiny_run
from ..servers import BUCKET, set_credentials

TRAIN, EVALUATE = ROOT / "train" / "train.py", ROOT / "train" / "evaluate.py"


def weights(run: Path) -> dict[str, bytes]:
    return {name: t.tobytes() for name, t in load_file(run / "model" / "diffusion_pytorch_model.safetensors").items()}


def test_a_run_from_s3_is_equal_to_a_run_from_disk(launch, leaf_shards, moto, monkeypatch, tmp_path):
    set_credentials(monkeypatch, f"http://{moto[0]}:{moto[1]}")
    location = f"s3://{BUCKET}/field/shards"
    far = {"data__train": f"{location}/train", "data__val": f"{location}/val", "data__cache": tmp_path / "cache"}
    for out, overrides in ((tmp_path / "near", {}), (tmp_path / "far", far)):
        done = launch(TRAIN, *tiny_run(leaf_shards, out, **overrides), processes=2)
        assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "far") == weights(tmp_path / "near")
    assert list((tmp_path / "cache").glob("*.spans"))
    evaluated = launch(EVALUATE, "--model", tmp_path / "far/model", "--data", location, "--out", tmp_path / "report")
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.fixture
def damaged(leaf_shards, tmp_path) -> tuple[Path, set[str]]:
    """Return shards with one flipped bit in a sample of each of two training shards, and the keys of these samples."""
    shards, keys = Path(shutil.copytree(leaf_shards, tmp_path / "shards")), set()
    for shard in (0, 2):
        tar = shards / "train" / f"leaf-{shard:06d}.tar"
        index = json.loads(tar.with_suffix(".index.json").read_text())
        content = bytearray(tar.read_bytes())
        content[index["bands_offset"][3] + 700] ^= 8
        tar.write_bytes(content)
        keys.add(index["keys"][3])
    return shards, keys


def test_bad_samples_are_replaced_named_and_counted(launch, damaged, tmp_path):
    shards, keys = damaged
    for processes in (1, 2):
        out = tmp_path / f"run-{processes}"
        # one epoch, so that every sample is read
        arguments = tiny_run(shards, out, data__max_bad_samples=2, data__check_every=2, train__max_steps=6)
        done = launch(TRAIN, *arguments, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [
            json.loads(line) for file in (out / "bad-samples").iterdir() for line in file.read_text().splitlines()
        ]
        assert {line["key"] for line in lines} == keys
        assert all("truncated or altered" in line["reason"] for line in lines)
        assert not {line["replaced_by"] for line in lines} & keys
        output = " ".join(done.stdout.split())
        assert "could not be read and were replaced" in output
        assert all(key in output for key in keys)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        assert [row["bad_samples"] for row in rows] == [steps.count(row["step"]) for row in rows]
        (checkpoint,) = (out / "checkpoints").glob("step-*6")
        saved = [tuple(sample) for sample in load_state(checkpoint)["bad_samples"]]
        assert saved == [(shard, 3) for shard in (0, 2)]
        events = EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        assert sum(event.value for event in events.Scalars("train_data/bad_samples")) == len(steps)
    one, two = (json.loads((tmp_path / f"run-{n}" / "metrics.jsonl").read_text().splitlines()[-1]) for n in (1, 2))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.slow
def test_too_many_bad_samples_stop_all_ranks_even_if_each_rank_read_few(launch, damaged, tmp_path):
    shards, _ = damaged
    arguments = tiny_run(
        shards, tmp_path / "run", data__max_bad_samples=1, data__check_every=1, train__max_steps=6, data__val="null"
    )
    done = launch(TRAIN, *arguments, processes=2)
    assert done.returncode != 0
    assert "data.max_bad_samples" in done.stderr
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_a_damaged_sample_stops_training_by_default(launch, damaged, tmp_path):
    shards, keys = damaged
    done = launch(TRAIN, *tiny_run(shards, tmp_path / "run", train__max_steps=6), processes=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors
    assert all(any(key in error for key in keys) for error in errors)
