"""The TensorBoard files of a run that was stopped, killed and finished."""

from __future__ import annotations

import json
from math import degrees
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from msvae.config import load_config
from msvae.shards.manifest import Manifest
from msvae.shards.reader import ShardReader

from ..conftest import ROOT, tiny_run
from .browser import browser, look, tensorboard

TRAIN, INTERRUPTED_TRAIN = ROOT / "train" / "train.py", Path(__file__).with_name("interrupted_train.py")
STEPS, EVALUATIONS = 9, [0, 3, 6, 9]
WAVELENGTHS = ("475nm", "539nm", "651nm", "731nm", "851nm")
SCALARS = {
    *(f"train/{name}" for name in ("loss", "mse", "sam", "kl", "angle_deg")),
    *(f"train_mse/{nm}" for nm in WAVELENGTHS),
    *(f"train_coverage/{name}" for name in ("mean", "min", "max", "empty_share", "skew_between_ranks")),
    *(f"train_data/{name}" for name in ("epoch", "leaf_pixels", "bad_samples", "nonfinite_elements")),
    *(f"train_optimizer/{name}" for name in ("lr", "lr_backbone", "grad_norm", "ema_distance", "skipped_steps")),
    *(f"train_speed/{what}_per_s{of}" for what in ("tiles", "leaf_pixels") for of in ("", "_per_device")),
    *(f"train_speed/{name}" for name in ("step_s", "data_wait_s", "join_s", "host_memory_gb")),
    *(f"validation/{name}" for name in ("loss", "mse", "sam", "psnr_db", "angle_deg", "ndvi_mae", "ndre_mae", "ssim")),
    *(f"validation_{name}/{nm}" for name in ("rmse", "band_importance") for nm in WAVELENGTHS),
}
PAGES = {
    "timeseries": ("train/loss", "train_coverage", "validation_rmse"),
    "custom_scalars": ("tf-custom-scalar-dashboard",),
    "images": ("tf-image-dashboard",),
    "text": ("tf-text-dashboard",),
    "hparams": ("tf-hparams-dashboard",),
}
"""Words that a page must hold. Chromium does not output the content of the shadow trees of dashboards."""
CHARTS = {"training loss", "band importance", "leaf share of the tiles: mean, minimum, maximum"}
CURVE_RGB = (255, 112, 67)
"""Colour of the first run in TensorBoard."""
SESSIONS = {
    "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
    "colParams": [{"metric": {"group": "", "tag": "validation/loss"}}],
    "startIndex": 0,
    "sliceSize": 9,
}
IMAGES = {f"validation/{name}" for name in ("tiles", "leaf_spectra", "bands", "ndvi", "ndre")}


def rows(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def out(launch, leaf_shards, tmp_path_factory) -> Path:
    """Return a run that was stopped where an evaluation was due, killed after that evaluation and before a checkpoint,
    and finished."""
    out = tmp_path_factory.mktemp("logged") / "run"
    arguments = tiny_run(
        leaf_shards, out, train__max_steps=STEPS, train__eval_every=3, train__checkpoint_every=100,
        optim__backbone_lr=5e-4,
    )  # fmt: skip
    stopped = launch(INTERRUPTED_TRAIN, "stop", 1, *arguments)
    assert "asked to stop: saved at step 3" in stopped.stdout, stopped.stderr[-3000:]
    assert [row["step"] for row in rows(out, "validation")] == [0]
    killed = launch(INTERRUPTED_TRAIN, "kill", 5, *arguments)
    assert "validation at step 3" in killed.stdout, killed.stderr[-3000:]
    done = launch(TRAIN, *arguments)
    assert "validation at step 3" in done.stdout, done.stderr[-3000:]
    assert done.returncode == 0
    return out


@pytest.fixture(scope="module")
def events(out) -> EventAccumulator:
    events = EventAccumulator(
        str(out / "tensorboard"), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0)
    )
    events.Reload()
    return events


def test_every_value_appears_once_and_in_order_after_a_stop_and_a_kill(out, events):
    assert len(list((out / "tensorboard").iterdir())) == 3, "one file per start, of the main process"
    found = events.Tags()["scalars"]
    assert set(found) == SCALARS
    for tag in found:
        expected = EVALUATIONS if tag.startswith("validation") else list(range(1, STEPS + 1))
        assert [event.step for event in events.Scalars(tag)] == expected, tag
    assert [row["step"] for row in rows(out, "metrics")] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows(out, "validation")] == EVALUATIONS
    images = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    # a killed run may lose unfinished pictures, but no earlier ones
    assert images.pop("train_coverage/histogram")[-2:] == EVALUATIONS[-2:]
    assert images.keys() == IMAGES
    assert all(steps == EVALUATIONS for steps in images.values())


def test_tensorboard_shows_the_values_of_the_log(out, events, leaf_shards):
    logged = rows(out, "metrics")
    shown = {tag: [event.value for event in events.Scalars(tag)] for tag in SCALARS if tag.startswith("train")}
    for tag, name in (("train/loss", "loss"), ("train_coverage/mean", "coverage"), ("train_speed/step_s", "step_s")):
        np.testing.assert_allclose(shown[tag], [row[name] for row in logged], rtol=1e-6)
    np.testing.assert_allclose(shown["train/angle_deg"], [degrees(row["sam"]) for row in logged], rtol=1e-6)
    np.testing.assert_allclose(
        shown["train_mse/851nm"], [row["mse_per_channel"]["851nm"] for row in logged], rtol=1e-6
    )
    pixels = 32 * 32 * 8
    for row in logged:
        assert row["leaf_pixels_per_s"] * row["step_s"] == pytest.approx(row["valid_pixels"], rel=1e-6)
        assert row["samples_per_s"] * row["step_s"] == pytest.approx(8)
        assert row["samples_per_s"] == pytest.approx(2 * row["samples_per_s_per_device"])
        assert row["valid_pixels"] / pixels == pytest.approx(row["coverage"])
        assert 0 <= row["join_s"] < row["step_s"]
        assert 0.05 < row["host_memory_gb"] < 50


def test_skew_is_the_difference_in_coverage_between_the_shares_of_two_ranks(out, leaf_shards):
    from msvae.shards.order import SampleOrder

    reader = ShardReader(leaf_shards / "train")
    order = SampleOrder(reader.samples_per_shard, seed=0)
    for step, row in enumerate(rows(out, "metrics")):
        leaf_shares = []
        for shard, sample, _ in order.samples(step, 8, range(8)):
            tile, leaf_mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], bool)
            reader.read_into(shard, sample, tile, leaf_mask)
            leaf_shares.append(leaf_mask.mean())
        assert row["coverage_skew"] == pytest.approx(abs(np.mean(leaf_shares[:4]) - np.mean(leaf_shares[4:])))


def test_the_distance_from_the_average_agrees_with_the_checkpoint(out):
    tensors = load_file(out / "checkpoints" / f"step-{STEPS:08d}" / "tensors.safetensors")
    weights = {name: tensors[name].astype(np.float64) for name in tensors if name.startswith("model/")}
    apart = sum(np.square(w - tensors[name.replace("model/", "average/")]).sum() for name, w in weights.items())
    expected = np.sqrt(apart / sum(np.square(w).sum() for w in weights.values()))
    assert expected > 1e-6
    assert rows(out, "metrics")[-1]["ema_distance"] == pytest.approx(expected, rel=1e-4)


def test_tensorboard_holds_the_run_card_and_the_configuration(out, events, leaf_shards):
    card, config = (
        events.Tensors(f"run/{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for name in ("card", "config")
    )
    for split in ("train", "val"):
        assert Manifest.load(leaf_shards / split).digest() in card
    assert "**world size**: `2`" in card
    assert "MULTI_CPU" in card
    assert "--num_processes 2" in card
    assert "train/train.py --model.pretrained tiny" in card
    assert "torch " in card
    assert load_config(out / "config.yaml").dump() in config


def test_settings_and_layout_are_stored_without_a_separate_run(out, events):
    assert [path.name for path in (out / "tensorboard").iterdir() if path.is_dir()] == []
    hparams = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    settings = hparams.session_start_info.hparams
    assert settings["optim.lr"].number_value == pytest.approx(1e-3)
    assert settings["model.pretrained"].string_value == "tiny"
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    tags = [
        tag.strip("^$").replace(".*", "")
        for category in layout.category
        for chart in category.chart
        for tag in (*chart.multiline.tag, *(t for s in chart.margin.series for t in (s.value, s.lower, s.upper)))
    ]
    assert len(tags) > 15
    for tag in tags:
        assert any(scalar.startswith(tag) for scalar in SCALARS), tag


def num_curve_pixels(picture: Path) -> int:
    pixels = np.asarray(Image.open(picture).convert("RGB"), np.int16)
    return int((np.abs(pixels - CURVE_RGB).max(axis=-1) < 8).sum())


@pytest.mark.slow
def test_tensorboard_shows_the_run_in_a_browser_without_errors(out, tmp_path):
    browser()
    with tensorboard(out, tmp_path / "server.log") as server:
        plugins = server.ask("data/plugins_listing")
        for page in ("timeseries", "scalars", "custom_scalars", "images", "text", "hparams"):
            assert plugins[page]["enabled"], page
        (session,) = server.ask("data/plugin/hparams/session_groups", SESSIONS)["sessionGroups"]
        assert session["hparams"]["optim.lr"] == pytest.approx(1e-3)
        shown = {metric["name"]["tag"]: metric["value"] for metric in session["metricValues"]}
        assert shown["validation/loss"] == pytest.approx(rows(out, "validation")[-1]["loss"])
        layout = server.ask("data/plugin/custom_scalars/layout")
        assert {chart["title"] for category in layout["category"] for chart in category["chart"]} >= CHARTS
        (images,), (texts,) = (server.ask(f"data/plugin/{kind}/tags").values() for kind in ("images", "text"))
        assert set(images) >= IMAGES
        assert {"run/card/text_summary", "run/config/text_summary"} <= set(texts)
        for page, words in PAGES.items():
            (tmp_path / page).mkdir()
            picture, content, console = look(f"{server.address}#{page}", tmp_path / page, words)
            assert picture.stat().st_size > 30_000, "an empty page"
            assert page != "custom_scalars" or num_curve_pixels(picture) > 2000
            assert "Uncaught" not in console, console
            assert "No dashboards are active" not in content
        assert server.complaints() == []
