"""What is drawn for an interval, and what an evaluation says in words."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from msvae.evaluation.baselines import training_split
from msvae.evaluation.runs import differing, names_of
from msvae.evaluation.summary import cautions, summary_lines, verdict
from msvae.evaluation.units import MAX_UNITS, units_of
from msvae.shards.reader import ShardReader
from msvae.shards.splits import TileOrigin, tile_origins


def tiles(*images: str, group: str | None = None) -> list[TileOrigin]:
    return [TileOrigin(f"{image}_r0_c{i}", image, group or image) for i, image in enumerate(images)]


def test_images_are_drawn_and_not_their_tiles():
    units = units_of(tiles("a", "a", "b", "a", "c"))
    assert (units.kind, units.num_drawn, units.num_units) == ("image", 3, 3)
    assert units.unit_of_tile.tolist() == [0, 0, 1, 0, 2]


def test_blocks_of_a_single_image_are_drawn_else_its_tiles():
    field = [TileOrigin(f"field_r{i}_c0", "field", f"field block {i // 2}") for i in range(6)]
    assert units_of(field).kind == "block"
    assert units_of(field).unit_of_tile.tolist() == [0, 0, 1, 1, 2, 2]
    alone = units_of(tiles("field", "field"))
    assert (alone.kind, alone.num_drawn) == ("tile", 2)


def test_very_many_images_share_places():
    units = units_of(tiles(*(str(i) for i in range(MAX_UNITS + 500))))
    assert (units.num_drawn, units.num_units) == (MAX_UNITS + 500, MAX_UNITS)
    assert sorted(set(units.unit_of_tile.tolist())) == list(range(MAX_UNITS))


def test_tiles_know_their_image_and_group(leaf_shards):
    found = tile_origins(ShardReader(leaf_shards / "train"))
    assert len(found) == ShardReader(leaf_shards / "train").manifest.num_samples
    for origin in found:
        assert origin.key.startswith(f"{origin.image}_r")
        assert origin.group == origin.image
    assert 1 < len({origin.image for origin in found}) < len(found)


def test_training_split_lies_beside_the_judged_one(leaf_shards, tmp_path):
    assert training_split(str(leaf_shards / "val")) == str(leaf_shards / "train")
    assert training_split(str(leaf_shards / "train")) == str(leaf_shards / "train")
    assert training_split(str(tmp_path / "val")) is None


def numbers(psnr_db: float, **more: object) -> dict[str, object]:
    ends = {"psnr_db": [psnr_db - 1, psnr_db + 1]}
    return {"psnr_db": psnr_db, "angle_deg": 3.0, "ndvi_mae": 0.02, "num_tiles": 40, "intervals": ends, **more}


@pytest.fixture
def metrics() -> dict:
    rivals = {
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
        "baselines": rivals,
        "differences": {
            name: {"psnr_db": {"value": sum(ends) / 2, "interval": list(ends)}} for name, ends in differences.items()
        },
        "rate": {"bits_per_value": 0.8, "ratio_float16": 20.0},
        "judged": {"split": "shards/test", "interval_unit": "image", "num_drawn": 40},
    }


def test_verdict_says_only_what_intervals_allow(metrics):
    said = verdict(metrics)
    assert said.startswith("Leaf reconstructions reach 30.00 dB PSNR (95 % interval 29.00 to 31.00)")
    assert "up 18.00 dB from the untrained model" in said
    assert (
        "better than PCA of blocks (28.00 dB), not told apart from JPEG 2000 (29.90 dB), worse than JPEG XL (31.00 dB)"
    ) in said
    assert "stands below three principal components" in said
    assert said.count(". ") == 2, "three sentences"
    assert cautions(metrics) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["judged"].update(split="shards/train"), "trained on these very tiles"),
        (lambda m: m["judged"].update(num_drawn=3), "Only 3 images were judged"),
        (lambda m: m["judged"].update(num_drawn=1, interval_unit="tile"), "A single tile was judged"),
        (lambda m: m["judged"].update(interval_unit="block"), "intervals were drawn over its blocks"),
        (lambda m: m["baselines"]["pca_latent"].update(fitted_on_judged=True), "fitted on the judged tiles"),
        (lambda m: m["baselines"]["jpeg_xl"].update(tiles_that_do_not_fit=2), "JPEG XL cannot code 2 of 40 tiles"),
    ],
)
def test_what_weakens_the_numbers_is_said(metrics, change, words):
    weaker = copy.deepcopy(metrics)
    change(weaker)
    (caution,) = cautions(weaker)
    assert words in caution


@pytest.mark.parametrize(
    ("mean_db", "words"), [(20.0, "is better"), (29.5, "is hardly better"), (30.5, "is no better")]
)
def test_hardly_more_than_the_mean_spectrum_is_called_that(metrics, mean_db, words):
    metrics["baselines"]["mean_spectrum"]["psnr_db"] = mean_db
    assert f"It {words} than the mean leaf spectrum everywhere" in verdict(metrics)


def test_a_codec_that_cannot_code_every_tile_is_not_beaten(metrics):
    metrics["baselines"]["jpeg_2000"]["tiles_that_do_not_fit"] = 1
    assert "JPEG 2000" not in verdict(metrics)
    metrics["baselines"]["jpeg_xl"]["tiles_that_do_not_fit"] = 40
    del metrics["baselines"]["pca_latent"]
    assert "20 times less than stored, nothing else keeps every tile." in verdict(metrics)
    assert summary_lines(metrics)[2].strip() == "at equal size: nothing else fits"


def test_screen_shows_before_after_and_what_takes_as_much_room(metrics):
    before, after, rivals = summary_lines(metrics)
    assert before == "before training: leaf PSNR 12.00 dB, angle 3.00°, NDVI error 0.0200"
    assert after == " after training: leaf PSNR 30.00 dB, angle 3.00°, NDVI error 0.0200"
    assert rivals.strip() == "at equal size: PCA of blocks 28.00 dB, JPEG XL 31.00 dB, JPEG 2000 29.90 dB"


def test_what_few_bands_cannot_have_is_not_spoken_of(metrics):
    """One band has no angle and no NDVI; three components keep all of three bands."""
    for numbers_of in (metrics["model"], *metrics["baselines"].values()):
        numbers_of.update(angle_deg=None, ndvi_mae=None)
    del metrics["baselines"]["pca3"]
    said = verdict(metrics)
    assert "reach 30.00 dB PSNR (95 % interval 29.00 to 31.00), up 18.00 dB" in said
    assert said.endswith("(20.00 dB), which tells no leaf tissues apart.")
    assert summary_lines(metrics)[1] == " after training: leaf PSNR 30.00 dB"


def test_settings_that_differ_are_found_and_no_others():
    configs = {"a": {"optim.lr": 1e-3, "out": "a", "data.val": None}, "b": {"optim.lr": 2e-3, "out": "b", "new": 1}}
    assert differing(configs) == {"optim.lr": {"a": 1e-3, "b": 2e-3}, "new": {"a": None, "b": 1}}


def test_runs_have_the_shortest_names_that_tell_them_apart(tmp_path):
    places = [tmp_path / name for name in ("small/run", "large/run")]
    assert names_of(places) == ["small", "large"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "y" / "b"]) == ["x/a", "y/a", "y/b"]


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
def test_image_and_group_are_what_key_and_json_say(key, about, image, group):
    """Also of tars that others wrote."""
    reader = SimpleNamespace(
        samples_per_shard=[1],
        store=SimpleNamespace(parallel_reads=1),
        key=lambda shard, row: key,
        json_object=lambda shard, row: about,
    )
    assert tile_origins(reader) == [TileOrigin(key, image, group)]
