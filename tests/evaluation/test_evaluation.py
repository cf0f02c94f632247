"""Units of resampling, sentences about results, and comparison of runs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from msvae.evaluation.baselines import find_training_split
from msvae.evaluation.compare import find_differences, short_names
from msvae.evaluation.measurement import MAX_ROWS, Units
from msvae.evaluation.summary import cautions, summary, summary_lines
from msvae.shards.reader import ShardReader
from msvae.shards.splits import TileOrigin, tile_origins


def tiles(*images: str, group: str | None = None) -> list[TileOrigin]:
    return [TileOrigin(f"{image}_r0_c{i}", image, group or image) for i, image in enumerate(images)]


def test_images_are_resampled_and_not_their_tiles():
    units = Units.from_origins(tiles("a", "a", "b", "a", "c"))
    assert (units.kind, units.num_units, units.num_rows) == ("image", 3, 3)
    assert units.row_of_tile.tolist() == [0, 0, 1, 0, 2]


def test_blocks_of_a_single_image_are_resampled_or_else_its_tiles():
    field = [TileOrigin(f"field_r{i}_c0", "field", f"field block {i // 2}") for i in range(6)]
    assert Units.from_origins(field).kind == "block"
    assert Units.from_origins(field).row_of_tile.tolist() == [0, 0, 1, 1, 2, 2]
    alone = Units.from_origins(tiles("field", "field"))
    assert (alone.kind, alone.num_units) == ("tile", 2)


def test_more_than_a_thousand_images_share_rows_of_sums():
    units = Units.from_origins(tiles(*(str(i) for i in range(MAX_ROWS + 500))))
    assert (units.num_units, units.num_rows) == (MAX_ROWS + 500, MAX_ROWS)
    assert sorted(set(units.row_of_tile.tolist())) == list(range(MAX_ROWS))


def test_origins_name_image_and_group_of_every_tile(leaf_shards):
    found = tile_origins(ShardReader(leaf_shards / "train"))
    assert len(found) == ShardReader(leaf_shards / "train").manifest.num_samples
    for origin in found:
        assert origin.key.startswith(f"{origin.image}_r")
        assert origin.group == origin.image
    assert 1 < len({origin.image for origin in found}) < len(found)


def test_training_split_is_found_in_the_same_dataset(leaf_shards, tmp_path):
    assert find_training_split(str(leaf_shards / "val")) == str(leaf_shards / "train")
    assert find_training_split(str(leaf_shards / "train")) == str(leaf_shards / "train")
    assert find_training_split(str(tmp_path / "val")) is None


def numbers(psnr_db: float, **more: object) -> dict[str, object]:
    ends = {"psnr_db": [psnr_db - 1, psnr_db + 1]}
    return {"psnr_db": psnr_db, "angle_deg": 3.0, "ndvi_mae": 0.02, "num_tiles": 40, "intervals": ends, **more}


@pytest.fixture
def metrics() -> dict:
    baselines = {
        "untrained": numbers(12.0),
        "pca3": numbers(45.0),
        "mean_spectrum": numbers(20.0),
        "pca_latent": numbers(28.0, fitted_on_judged=False),
        "jpeg_xl": numbers(31.0, tiles_that_do_not_fit=0),
        "jpeg_2000": numbers(29.9, tiles_that_do_not_fit=0),
    }
    differences = {"pca_latent": (1.5, 2.5), "jpeg_xl": (-1.5, -0.5), "jpeg_2000": (-0.2, 0.4)}
    return {
        "model": numbers(30.0),
        "baselines": baselines,
        "differences": {
            name: {"psnr_db": {"value": sum(ends) / 2, "interval": list(ends)}} for name, ends in differences.items()
        },
        "rate": {"bits_per_value": 0.8, "ratio_float16": 20.0},
        "judged": {"split": "shards/test", "interval_unit": "image", "num_drawn": 40},
    }


def test_summary_calls_a_baseline_better_or_worse_only_if_the_interval_excludes_zero(metrics):
    text = summary(metrics)
    assert text.startswith("The model reconstructs leaves with a PSNR of 30.00 dB (95 % interval 29.00 to 31.00)")
    assert "18.00 dB above the untrained model" in text
    assert (
        "better than PCA of blocks (28.00 dB), not clearly different from JPEG 2000 (29.90 dB), "
        "worse than JPEG XL (31.00 dB)"
    ) in text
    assert "Its PSNR is below that of three principal components" in text
    assert text.count(". ") == 5, "six sentences"
    assert cautions(metrics) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["judged"].update(split="shards/train"), "The model was trained on these tiles"),
        (lambda m: m["judged"].update(num_drawn=3), "Only 3 images were evaluated"),
        (lambda m: m["judged"].update(num_drawn=1, interval_unit="tile"), "Only one tile was evaluated"),
        (lambda m: m["judged"].update(interval_unit="block"), "intervals were computed by resampling its blocks"),
        (lambda m: m["baselines"]["pca_latent"].update(fitted_on_judged=True), "fitted on the evaluated tiles"),
        (lambda m: m["baselines"]["jpeg_xl"].update(tiles_that_do_not_fit=2), "JPEG XL cannot store 2 of 40 tiles"),
    ],
)
def test_each_reason_for_unreliable_numbers_has_a_caution(metrics, change, words):
    weaker = copy.deepcopy(metrics)
    change(weaker)
    (caution,) = cautions(weaker)
    assert words in caution


@pytest.mark.parametrize(
    ("mean_db", "words"), [(20.0, "is better"), (29.5, "is hardly better"), (30.5, "is no better")]
)
def test_a_gain_below_1_db_over_the_mean_spectrum_is_called_hardly_better(metrics, mean_db, words):
    metrics["baselines"]["mean_spectrum"]["psnr_db"] = mean_db
    assert f"It {words} than the mean leaf spectrum in every pixel" in summary(metrics)


def test_summary_leaves_out_a_codec_that_cannot_store_every_tile(metrics):
    metrics["baselines"]["jpeg_2000"]["tiles_that_do_not_fit"] = 1
    assert "JPEG 2000" not in summary(metrics)
    metrics["baselines"]["jpeg_xl"]["tiles_that_do_not_fit"] = 40
    del metrics["baselines"]["pca_latent"]
    assert "20 times smaller than uncompressed shards. At this size, no other method can store every tile." in summary(
        metrics
    )
    assert summary_lines(metrics)[2].strip() == "at equal size: no other method can store every tile"


def test_screen_shows_quality_before_and_after_training_and_baselines_of_equal_size(metrics):
    before, after, baselines = summary_lines(metrics)
    assert before == "before training: leaf PSNR 12.00 dB, angle 3.00°, NDVI error 0.0200"
    assert after == " after training: leaf PSNR 30.00 dB, angle 3.00°, NDVI error 0.0200"
    assert baselines.strip() == "at equal size: PCA of blocks 28.00 dB, JPEG XL 31.00 dB, JPEG 2000 29.90 dB"


def test_metrics_that_the_bands_do_not_allow_are_not_mentioned(metrics):
    """One band has no angle and no NDVI. Three bands or fewer have no PCA of spectra."""
    for numbers_of in (metrics["model"], *metrics["baselines"].values()):
        numbers_of.update(angle_deg=None, ndvi_mae=None)
    del metrics["baselines"]["pca3"]
    text = summary(metrics)
    assert "a PSNR of 30.00 dB (95 % interval 29.00 to 31.00), 18.00 dB above" in text
    assert text.endswith("(20.00 dB), which contains no spatial detail.")
    assert summary_lines(metrics)[1] == " after training: leaf PSNR 30.00 dB"


def test_only_settings_that_differ_are_found():
    configs = {"a": {"optim.lr": 1e-3, "out": "a", "data.val": None}, "b": {"optim.lr": 2e-3, "out": "b", "new": 1}}
    assert find_differences(configs) == {"optim.lr": {"a": 1e-3, "b": 2e-3}, "new": {"a": None, "b": 1}}


def test_runs_have_the_shortest_distinct_names(tmp_path):
    paths = [tmp_path / name for name in ("small/run", "large/run")]
    assert short_names(paths) == ["small", "large"]
    assert short_names([tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "y" / "b"]) == ["x/a", "y/a", "y/b"]


@pytest.mark.parametrize(
    ("key", "about", "image", "group"),
    [
        ("field_r00000_c00128", {"source": ["blue.tif"], "group": "field block 3"}, "field", "field block 3"),
        ("a_r1_b_r00000_c00128", {}, "a_r1_b", "a_r1_b"),
        ("sample-17", {"source": ["scan.tif", "scan.hdr"]}, "scan.tif, scan.hdr", "scan.tif, scan.hdr"),
        ("sample-17", {"source": "scan.tif", "group": 4}, "scan.tif", "4"),
        ("sample-17", {}, "sample-17", "sample-17"),
    ],
)
def test_image_and_group_come_from_key_and_json(key, about, image, group):
    """This includes shards that other tools wrote."""
    reader = SimpleNamespace(
        samples_per_shard=[1],
        store=SimpleNamespace(parallel_reads=1),
        key=lambda shard, row: key,
        json_object=lambda shard, row: about,
    )
    assert tile_origins(reader) == [TileOrigin(key, image, group)]
