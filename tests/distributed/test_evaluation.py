"""Evaluations of a trained model by real processes, their report in a real browser, and comparisons of runs."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from msvae.evaluation.compare import read_runs

from ..conftest import ROOT, tiny_run
from .browser import layout, print_pages

TRAIN, EVALUATE, COMPARE = (ROOT / "train" / name for name in ("train.py", "evaluate.py", "compare.py"))
BASELINES = {"untrained", "pca3", "mean_spectrum", "pca_latent", "jpeg_xl", "jpeg_2000"}


@pytest.fixture(scope="module")
def shards(leaf_images, tmp_path_factory) -> Path:
    """Return shards with tiles that are large enough for the headers of a codec."""
    from msvae.packing.options import PackOptions
    from msvae.packing.pack import pack

    out = tmp_path_factory.mktemp("evaluated") / "shards"
    pack([leaf_images], out, PackOptions(tile_px=48, tiles_per_shard=5))
    return out


@pytest.fixture(scope="module")
def run(launch, shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    done = launch(TRAIN, *tiny_run(shards, out, train__max_steps=4, train__eval_every=2), processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def report(launch, shards, run, tmp_path_factory) -> Path:
    """Return an evaluation of the training split, which has several batches, by one process."""
    return evaluation(launch, run / "model", shards / "train", tmp_path_factory.mktemp("reports") / "one", 1)


def evaluation(launch, model: Path, data: Path, out: Path, processes: int) -> Path:
    done = launch(EVALUATE, "--model", model, "--data", data, "--out", out, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after training: leaf PSNR" in done.stdout
    return out


def read(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def check_same(found: Path, expected: Path) -> None:
    """Check that two evaluations have equal numbers, in every digit."""
    assert read(found) == read(expected)
    for table in ("tiles.csv", "images.csv", "groups.csv"):
        assert (found / table).read_bytes() == (expected / table).read_bytes()


def test_numbers_are_the_same_on_one_and_two_ranks(launch, shards, run, report, tmp_path):
    check_same(evaluation(launch, run / "model", shards / "train", tmp_path / "two", 2), report)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 5])
def test_numbers_are_the_same_on_any_number_of_ranks(launch, shards, run, report, tmp_path, processes):
    """Five ranks are more than there are batches."""
    check_same(evaluation(launch, run / "model", shards / "train", tmp_path / "many", processes), report)


def test_every_reconstruction_has_its_metrics_and_intervals(report):
    metrics = read(report)
    assert metrics["baselines"].keys() == BASELINES
    assert metrics["differences"].keys() == BASELINES
    assert metrics["judged"]["interval_unit"] == "image"
    for numbers in (metrics["model"], *metrics["baselines"].values()):
        assert len(numbers["rmse_per_band"]) == len(numbers["bias_per_band"]) == 5
        assert len(numbers["angle_deg_per_decile"]) == 10
        for name, ends in numbers["intervals"].items():
            values, pairs = (numbers[name], ends) if isinstance(numbers[name], list) else ([numbers[name]], [ends])
            for value, (low, high) in zip(values, pairs, strict=True):
                assert low <= high
                # the percentiles of the resamples contain the metric, except for the skew of a few images
                assert low - 0.5 * (high - low) - 1e-9 <= value <= high + 0.5 * (high - low) + 1e-9, name
    latent, rate = metrics["latent"], metrics["rate"]
    assert len(latent["mean_per_channel"]) == rate["values_per_block"] == 16
    assert rate["stored_bits_per_tile"] == 16 * 5 * 48 * 48
    assert rate["latent_bits_per_tile"] == 16 * 16 * 6 * 6
    for codec in ("jpeg_xl", "jpeg_2000"):
        assert 0 < metrics["baselines"][codec]["bits_per_value"] <= rate["bits_per_value"]


def test_baselines_are_in_the_expected_order(report):
    """The tiles are the training tiles, from which the baselines were computed."""
    baselines = read(report)["baselines"]
    psnr_db = {name: numbers["psnr_db"] for name, numbers in baselines.items()}
    assert psnr_db["pca3"] > psnr_db["mean_spectrum"]
    assert psnr_db["pca_latent"] > psnr_db["mean_spectrum"]
    assert abs(sum(baselines["mean_spectrum"]["bias_per_band"])) < 1e-6
    assert baselines["pca_latent"]["fitted_on_judged"] is False
    assert baselines["mean_spectrum"]["bits_per_value"] == 0


def test_tables_list_every_image_and_tile_with_the_largest_error_first(report):
    metrics = read(report)
    for name, count in (("tiles", metrics["model"]["num_tiles"]), ("images", metrics["judged"]["num_images"])):
        with (report / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
        rmse = [float(row["rmse"]) for row in rows]
        assert rmse == sorted(rmse, reverse=True)
        pixels = [int(row["leaf_pixels"]) for row in rows]
        assert sum(pixels) == metrics["model"]["num_leaf_pixels"]
        mean_square = sum(n * value**2 for n, value in zip(pixels, rmse, strict=True)) / sum(pixels)
        assert mean_square**0.5 == pytest.approx(metrics["model"]["rmse"], rel=1e-12)


def test_float16_latents_change_psnr_by_less_than_0_001_db(shards, run):
    """The size of latents is that of float16, but the metrics are measured with float32."""
    from msvae import AutoencoderKLMultispectralAdapter
    from msvae.evaluation.evaluator import Evaluator
    from msvae.shards.reader import ShardReader

    model = AutoencoderKLMultispectralAdapter.from_pretrained(run / "model")
    alone = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    error = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in Evaluator(ShardReader(shards / "val"), alone, 8, num_workers=1).batches():
            latents = model.encode(batch.tiles, mask=batch.leaf_mask).latent_dist.mode()
            for i, kept in enumerate((latents, latents.half().float())):
                off = (model.decode(kept).sample - batch.tiles).double()
                error[i] += torch.where(batch.leaf_mask, off, 0.0).square().sum()
    assert abs(10 * torch.log10(error[1] / error[0])) < 0.001


@pytest.mark.parametrize("width_px", [1400, 400])
def test_report_fits_a_screen_and_a_phone_and_loads_nothing_from_the_net(report, tmp_path, width_px):
    seen = layout(report / "report.html", tmp_path, width_px)
    assert seen["width"] == width_px
    assert seen["scroll_width"] <= width_px, "nothing is wider than the page"
    assert seen["broken_pictures"] == 0
    assert seen["pictures"] == 5
    assert seen["requests"] == []
    assert "http" not in (report / "report.html").read_text()


def test_report_prints_on_a_few_pages(report, tmp_path):
    assert 2 <= print_pages(report / "report.html", tmp_path) <= 8


def test_comparison_shows_only_what_differs_between_runs(launch, shards, run, report, tmp_path):
    second = tmp_path / "second"
    overrides = {"train__max_steps": 4, "train__eval_every": 2, "optim__lr": 3e-3, "loss__sam_weight": 0.5}
    assert launch(TRAIN, *tiny_run(shards, second, **overrides), processes=1).returncode == 0
    shutil.copytree(report, run / "report", dirs_exist_ok=True)
    done = compare(run, second, "--out", tmp_path / "compared")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "compared" / "compare.html").read_text()
    for words in ("optim.lr", "loss.sam_weight", f"{read(report)['model']['psnr_db']:.2f}", "not evaluated"):
        assert words in page
        assert words in done.stdout
    assert "train.seed" not in page, "equal settings are not listed"
    assert "Compare PSNR, angle and indices, not the loss" in page
    seen = layout(tmp_path / "compared" / "compare.html", tmp_path, 400)
    assert seen["scroll_width"] <= 400
    assert seen["requests"] == []


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["RUN"], "got 1 run, expected two or more"),
        (["RUN", "RUN"], "is named twice; name each run once"),
        (["RUN", "RUN/model"], "is not a run: it has no config.yaml"),
        (["RUN", "nowhere"], "nowhere does not exist"),
        (["RUN", "s3://bucket/run"], "copy the run from its store first"),
    ],
)
def test_a_folder_that_is_no_run_is_an_error(run, folders, message):
    with pytest.raises(ValueError, match=message):
        read_runs([folder.replace("RUN", str(run)) for folder in folders])


def test_an_error_is_one_line_and_leaves_no_folder(tmp_path):
    done = compare("nowhere", "elsewhere", "--out", tmp_path / "compared")
    assert done.returncode == 2
    assert done.stderr == "error: nowhere does not exist; name a folder that training wrote\n"
    assert not (tmp_path / "compared").exists()


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, COMPARE, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_report_warns_if_the_dataset_has_no_training_split(launch, shards, run, tmp_path):
    shutil.copytree(shards / "val", tmp_path / "alone" / "val")
    out = evaluation(launch, run / "model", tmp_path / "alone", tmp_path / "report", 1)
    assert read(out)["baselines"]["pca_latent"]["fitted_on_judged"] is True
    assert "was fitted on the evaluated tiles" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_diverged_model_is_an_error_that_names_tiles(launch, shards, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "model" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(weights).items()}, weights)
    arguments = ("--model", tmp_path / "run" / "model", "--data", shards, "--out", tmp_path / "report")
    done = launch(EVALUATE, *arguments, processes=1)
    assert done.returncode != 0
    assert "error: model reconstructs values that are not finite in some of the tiles leaf_" in done.stderr
    assert not (tmp_path / "report").exists()
