"""Whole runs of real processes: resume, order of samples, refusals, and the files of a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..conftest import ROOT, launch_command, tiny_run

TRAIN, EVALUATE = ROOT / "train" / "train.py", ROOT / "train" / "evaluate.py"
RANKS = 3
"""Three, because the sum of three numbers depends on their order, and that of two does not."""
RUN = {
    "data__global_batch_size": 12,
    "train__max_steps": 12,
    "train__checkpoint_every": 3,
    "train__eval_every": 5,
    "data__trace": True,
    "optim__backbone_lr": 5e-4,
    "data__flips": True,
    "data__quarter_turns": True,
    "data__crop_px": 24,
}


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(out: Path, folder: str = "model") -> dict[str, np.ndarray]:
    return load_file(out / folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(launch, leaf_shards, tmp_path_factory) -> Path:
    """Return a run of twelve steps on three processes without interruption."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(TRAIN, *tiny_run(leaf_shards, out, **RUN), processes=RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def kill_after_step(command: list[str], out: Path, step: int) -> None:
    """Kill the launcher and all ranks as soon as the log holds `step`."""
    run = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    log = out / "metrics.jsonl"
    while not log.is_file() or f'"step": {step},' not in log.read_text():
        assert run.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ranks = run.children(recursive=True)
    assert len(ranks) >= RANKS
    for process in (*ranks, run):
        process.kill()
    psutil.wait_procs([*ranks, run])


def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(launch, leaf_shards, undisturbed, tmp_path):
    out = tmp_path / "killed"
    arguments = tiny_run(leaf_shards, out, **RUN)
    kill_after_step(launch_command(TRAIN, *arguments, processes=RANKS), out, step=7)
    assert not (out / "model").exists()
    done = launch(TRAIN, *arguments, processes=RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 6" in done.stdout
    for folder in ("model", "best"):
        expected, actual = weights(undisturbed, folder), weights(out, folder)
        assert expected.keys() == actual.keys()
        assert all(np.array_equal(expected[name], actual[name]) for name in expected)
    for name in ("metrics.jsonl", "validation.jsonl"):
        logged = [row["step"] for row in json_lines(out / name)]
        assert logged == [row["step"] for row in json_lines(undisturbed / name)]
    losses = [[row["loss"] for row in json_lines(run / "metrics.jsonl")] for run in (out, undisturbed)]
    assert losses[0] == losses[1]


def test_a_run_resumed_on_another_number_of_ranks_ends_with_equal_weights(launch, leaf_shards, undisturbed, tmp_path):
    out = tmp_path / "moved"
    arguments = tiny_run(leaf_shards, out, **RUN)
    kill_after_step(launch_command(TRAIN, *arguments, processes=RANKS), out, step=4)
    done = launch(TRAIN, *arguments, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 3" in done.stdout
    seen = [json_lines(path) for path in sorted((out / "trace").iterdir())]
    assert [rows[-1]["step"] for rows in seen] == [12, 12, 3], "a rank that is gone keeps what will be seen again"
    expected, actual = weights(undisturbed), weights(out)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    validation, by_three = (json_lines(run / "validation.jsonl")[-1] for run in (out, undisturbed))
    assert validation.keys() == by_three.keys()
    for name in ("loss", "mse", "psnr_db", "angle_deg", "ndvi_mae", "ssim"):
        assert validation[name] == pytest.approx(by_three[name], rel=1e-4), name


def test_ranks_see_each_sample_once_per_epoch(undisturbed, leaf_shards):
    ranks = [json_lines(undisturbed / "trace" / f"rank-{rank:05d}.jsonl") for rank in range(RANKS)]
    assert [row["step"] for row in ranks[0]] == list(range(1, 13))
    manifest = json.loads((leaf_shards / "train" / "manifest.json").read_text())
    num_samples = sum(manifest["shards"]["num_samples"])
    sequence = [key for pair in zip(*ranks, strict=True) for row in pair for key in row["keys"]]
    assert len(sequence) == 12 * 12
    first_epoch = sequence[:num_samples]
    assert len(set(first_epoch)) == num_samples


def test_a_run_writes_logs_checkpoints_configuration_and_event_files(undisturbed):
    rows = json_lines(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"epoch", "loss", "mse", "sam", "coverage", "lr", "grad_norm", "samples_per_s", "data_wait_s"} <= rows[
        0
    ].keys()
    assert [row["step"] for row in json_lines(undisturbed / "validation.jsonl")] == [0, 5, 10, 12]
    assert [path.name for path in sorted((undisturbed / "checkpoints").glob("step-*"))] == [
        f"step-{step:08d}" for step in (6, 9, 12)
    ]
    assert (undisturbed / "checkpoints" / "latest").read_text() == "step-00000012\n"
    kinds = {path.name for path in (undisturbed / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {"tensors.safetensors", "state.json", "checksums.json", "latest"}, (
        "a checkpoint holds numbers and text, nothing that runs"
    )
    assert (undisturbed / "config.yaml").is_file()
    assert not [path for path in undisturbed.rglob(".*")], "partial files are left"
    events = EventAccumulator(str(undisturbed / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train_coverage/mean", "validation/psnr_db", "train_mse/475nm"} <= set(tags["scalars"])
    assert {"validation/tiles", "validation/leaf_spectra"} <= set(tags["images"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


def test_saved_models_hold_the_metrics_of_their_validation(undisturbed):
    rows = json_lines(undisturbed / "validation.jsonl")
    assert json.loads((undisturbed / "untrained" / "config.json").read_text())["metrics"] is None
    for folder, row in (("best", min(rows, key=lambda row: row["loss"])), ("model", rows[-1])):
        metrics = json.loads((undisturbed / folder / "config.json").read_text())["metrics"]
        names = ("psnr_db", "angle_deg", "ndvi_mae", "ndre_mae", "ssim")
        assert metrics == {name: row[name] for name in names if row[name] is not None}
        assert f"| {row['psnr_db']:.4g} |" in (undisturbed / folder / "README.md").read_text()


REFUSALS = [
    ({"train__seed": 9}, r"belongs to another run (train.seed: 0 -> 9)"),
    ({"out": "/proc/run"}, "cannot write /proc/run (No such file or directory: /proc); choose a writable folder"),
    ({"train__max_stepz": 3}, "key train.max_stepz is unknown; did you mean train.max_steps?"),
]
MORE_REFUSALS = [
    ({"train__resume": "never"}, "holds an earlier run up to step-00000012; choose another `out`"),
    ({"train__resume": "/nowhere"}, "/nowhere is not a checkpoint"),
    ({"data__train": "{shards}"}, "holds no manifest.json; did you mean"),
    ({"data__train": "{shards}/val"}, "(the training data differ: data.train: {shards}/train -> {shards}/val)"),
    ({"data__global_batch_size": 7}, "data.global_batch_size is 7, expected a multiple of 3 ranks x"),
    ({"data__train": "/nowhere"}, "/nowhere holds no manifest.json; make shards with `msvae pack"),
    ({"train__resume": "{out}/checkpoints/step-00000006"}, "continues to step-00000012 after step-00000006"),
    (
        {"data__val": "{shards}/train", "model__pretrained": "/nowhere"},
        "/nowhere is neither a folder nor a hub id",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [*REFUSALS, *(pytest.param(*refusal, marks=pytest.mark.slow) for refusal in MORE_REFUSALS)],
)
def test_a_wrong_option_or_folder_is_refused_in_one_line(launch, undisturbed, leaf_shards, overrides, message):
    folders = {"out": undisturbed, "shards": leaf_shards}
    overrides = {name: str(value).format(**folders) for name, value in overrides.items()}
    before = sorted(path.relative_to(undisturbed) for path in undisturbed.rglob("*"))
    settings = {**RUN, "out": undisturbed, **overrides}
    done = launch(TRAIN, *tiny_run(leaf_shards, **settings), processes=RANKS)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    message = message.replace("{shards}", str(leaf_shards))
    assert message in lines[0]
    last = done.stderr[done.stderr.rindex("Root Cause") :]
    assert message in last
    assert "Traceback" not in last
    assert sorted(path.relative_to(undisturbed) for path in undisturbed.rglob("*")) == before


def test_processes_that_would_train_separate_models_are_refused(leaf_shards, tmp_path):
    """Without mpirun, the MULTI_CPU type of accelerate starts one of two processes without a message."""
    config = tmp_path / "multi_cpu.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    command = launch_command(TRAIN, *tiny_run(leaf_shards, tmp_path / "run"), processes=2)
    command[command.index("--config_file") + 1] = str(config)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "error: accelerate was asked for several processes and started one" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_launcher_whose_processes_do_not_join_is_refused(leaf_shards, tmp_path, monkeypatch):
    from msvae.distributed.setup import check_all_joined

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="started 4 processes but 1 joined"):
        check_all_joined(1)


def test_a_finished_run_started_again_changes_nothing(launch, undisturbed, leaf_shards):
    names = (
        "metrics.jsonl",
        "validation.jsonl",
        "trace/rank-00000.jsonl",
        "model/diffusion_pytorch_model.safetensors",
        "model/config.json",
        "model/README.md",
    )
    before = [(undisturbed / name).read_bytes() for name in names]
    done = launch(TRAIN, *tiny_run(leaf_shards, undisturbed, **RUN), processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished at step 12" in done.stdout
    assert [(undisturbed / name).read_bytes() for name in names] == before


@pytest.mark.slow
def test_a_branch_from_a_checkpoint_into_another_folder_can_be_evaluated(launch, undisturbed, leaf_shards, tmp_path):
    out = tmp_path / "branch"
    start = undisturbed / "checkpoints" / "step-00000009"
    overrides = {**RUN, "train__resume": start, "data__val": "null", "train__max_steps": 10}
    done = launch(TRAIN, *tiny_run(leaf_shards, out, **overrides), processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in json_lines(out / "metrics.jsonl")] == [10]
    initial, expected = weights(out, "untrained"), weights(undisturbed, "untrained")
    assert all(np.array_equal(initial[name], expected[name]) for name in expected)
    arguments = ("--model", out / "model", "--data", leaf_shards / "val", "--out", tmp_path / "report")
    assert launch(EVALUATE, *arguments, processes=1).returncode == 0


def test_a_diverged_run_stops_and_keeps_its_last_good_weights(launch, leaf_shards, tmp_path):
    out = tmp_path / "diverged"
    overrides = {"optim__lr": 1e30, "optim__warmup_steps": 0, "train__checkpoint_every": 1, "train__max_steps": 9}
    arguments = tiny_run(leaf_shards, out, **overrides, train__max_nonfinite_steps=3, data__val="null")
    done = launch(TRAIN, *arguments, processes=1)
    assert done.returncode != 0
    assert (
        "error: the losses or gradients of 3 consecutive steps, up to step 4, were not finite and changed nothing"
        in done.stderr
    )
    assert "the last step had the samples leaf" in done.stderr
    saved = [load_file(path / "tensors.safetensors") for path in sorted((out / "checkpoints").glob("step-*"))]
    assert all(np.isfinite(tensor).all() for tensors in saved for tensor in tensors.values())
    assert all(np.array_equal(saved[0][name], saved[-1][name]) for name in saved[0]), "a skipped step changes nothing"
    assert not (out / "model").exists()


@pytest.mark.slow
def test_a_machine_without_the_checkpoint_receives_it_from_another(launch, undisturbed, leaf_shards, tmp_path):
    """The machines share no disk, and the one with the checkpoint is not the first."""
    script = tmp_path / "train_on_own_disk.py"
    script.write_text(
        "import os, sys\n"
        "sys.argv = [a.replace('NODE', 'node-' + os.environ['RANK']) for a in sys.argv]\n"
        "os.environ['LOCAL_RANK'] = '0'\n"
        f"exec(open({str(TRAIN)!r}).read())\n"
    )
    shutil.copytree(undisturbed, tmp_path / "node-1")
    for late in (tmp_path / "node-1" / "checkpoints").glob("step-*[029]"):
        shutil.rmtree(late)
    done = launch(script, *tiny_run(leaf_shards, tmp_path / "NODE", **RUN), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step 6" in done.stdout
    expected, actual = weights(undisturbed), weights(tmp_path / "node-0")
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
