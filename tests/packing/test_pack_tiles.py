"""Shards hold the values and masks of the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.rasters import raster
from msvae.shards.manifest import Manifest, ShardIndex
from msvae.shards.stores import open_store

RICE = Path(__file__).parents[2] / ".." / "shared" / "data" / "rice"
RICE_BANDS = ("blue.tif", "green.tif", "red.tif", "red_edge.tif", "nir.tif")
SPLITS = ("train", "val", "test")
TILES_OF_16 = PackOptions(tile_px=16, overwrite=True)


def test_tiles_and_masks_equal_the_windows_of_the_source(tmp_path, leaf_image, read_tars):
    image = leaf_image(tmp_path / "field.tif", size_px=70)
    summary = pack([image], tmp_path / "out", PackOptions(tile_px=16, block_tiles=1, gap_px=0, tiles_per_shard=3))
    with rasterio.open(image) as opened, rasterio.open(tmp_path / "field_mask.png") as mask:
        source, leaf = opened.read(), mask.read(1) > 0
    samples = {key: sample for split in SPLITS for key, sample in read_tars(tmp_path / "out" / split).items()}
    assert len(samples) == sum(summary.tiles.values()) == 16
    for key, sample in samples.items():
        row, col, height, width = sample["json"]["window"]
        window = np.s_[row : row + height, col : col + width]
        assert key == f"field_r{row:05d}_c{col:05d}"
        assert sample["bands.npy"].dtype == np.uint16
        np.testing.assert_array_equal(sample["bands.npy"], source[(slice(None), *window)])
        np.testing.assert_array_equal(sample["mask.png"], leaf[window])
        assert sample["json"]["coverage"] == leaf[window].mean()
        assert sample["json"]["source"] == ["field.tif"]
    assert sum(summary.leaf_pixels.values()) == leaf[:64, :64].sum()


def test_webdataset_reads_the_same_samples_as_tarfile(tmp_path, leaf_image, read_tars):
    import webdataset

    pack([leaf_image(tmp_path / "field.tif")], tmp_path / "out", PackOptions(tile_px=16, block_tiles=1))
    folder = tmp_path / "out" / "train"
    expected = read_tars(folder)
    read = list(webdataset.WebDataset(str(folder / "leaf-000000.tar"), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in read] == list(expected)
    for sample in read:
        np.testing.assert_array_equal(sample["bands.npy"], expected[sample["__key__"]]["bands.npy"])
        mask = np.asarray(sample["mask.png"].convert("1"))
        np.testing.assert_array_equal(mask, expected[sample["__key__"]]["mask.png"])


def test_statistics_equal_those_of_all_training_leaf_pixels_in_float64(tmp_path, write_raster, read_tars):
    rng = np.random.default_rng(1)
    shape = (48, 48)
    values = rng.normal(0.3, 0.001, (5, *shape)) + rng.normal(0, 0.1, shape) * np.arange(5)[:, None, None]
    images = [
        write_raster(tmp_path / f"leaf{i}.tif", (values + i).astype(np.float32), mask=rng.random(shape) < 0.4)
        for i in range(3)
    ]
    pack(images, tmp_path / "out", PackOptions(tile_px=16, scale=0.5))
    pixels = np.concatenate(
        [
            sample["bands.npy"].astype(np.float64)[:, sample["mask.png"]]
            for sample in read_tars(tmp_path / "out" / "train").values()
        ],
        axis=1,
    )
    manifests = [Manifest.load(tmp_path / "out" / split) for split in SPLITS]
    statistics = manifests[0].statistics
    assert statistics.num_pixels == pixels.shape[1]
    np.testing.assert_allclose(statistics.mean, 0.5 * pixels.mean(1), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, 0.5 * pixels.std(1), rtol=1e-10)
    np.testing.assert_allclose(statistics.covariance, 0.25 * np.cov(pixels, bias=True), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(statistics.minimum, 0.5 * pixels.min(1), rtol=1e-15)
    np.testing.assert_allclose(statistics.maximum, 0.5 * pixels.max(1), rtol=1e-15)
    assert all(manifest.statistics == statistics for manifest in manifests)


def test_background_does_not_change_the_statistics(tmp_path, write_raster):
    rng = np.random.default_rng(2)
    leaf = rng.random((64, 64)) < 0.5
    values = rng.random((5, 64, 64)).astype(np.float32)
    manifests = []
    for name, background in (("zero", 0.0), ("huge", 1e30), ("nan", np.nan), ("inf", np.inf)):
        image = write_raster(tmp_path / name / "leaf.tif", np.where(leaf, values, np.float32(background)), mask=leaf)
        pack([image], tmp_path / f"out_{name}", PackOptions(tile_px=16))
        manifests.append(Manifest.load(tmp_path / f"out_{name}" / "train"))
    assert len({manifest.statistics.model_dump_json() for manifest in manifests}) == 1


def test_same_input_gives_the_same_bytes(tmp_path, leaf_image):
    images = [leaf_image(tmp_path / f"leaf{i}.tif", seed=i) for i in range(4)]
    for out in ("first", "second"):
        pack(images, tmp_path / out, PackOptions(tile_px=16, seed=5, tiles_per_shard=7))
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert len(files) > 6
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


@pytest.mark.parametrize("slab_bytes", [1, 10_000, 2**26])
def test_bytes_do_not_depend_on_file_layout_or_memory(tmp_path, leaf_image, monkeypatch, slab_bytes):
    monkeypatch.setattr(raster, "MAX_SLAB_BYTES", slab_bytes)
    tars = []
    for name, profile in (
        ("strips", {}),
        ("planes", {"interleave": "band", "compress": "lzw"}),
        ("blocks", {"tiled": True, "blockxsize": 32, "blockysize": 32, "compress": "deflate"}),
    ):
        pack([leaf_image(tmp_path / name / "leaf.tif", size_px=70, **profile)], tmp_path / "out", TILES_OF_16)
        tars.append((tmp_path / "out" / "train" / "leaf-000000.tar").read_bytes())
    assert tars[0] == tars[1] == tars[2]


def test_shards_hold_at_most_tiles_per_shard_and_match_their_index(tmp_path, leaf_image):
    summary = pack(
        [leaf_image(tmp_path / "field.tif")],
        tmp_path / "out",
        PackOptions(tile_px=8, block_tiles=1, gap_px=0, tiles_per_shard=10),
    )
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.shards.num_samples[:-1] == [10] * (len(manifest.shards) - 1)
    assert manifest.num_samples == summary.tiles["train"] == 45
    assert len(manifest.shards) == summary.num_shards["train"] == 5
    for shard in manifest.shards:
        assert len(ShardIndex.load(open_store(tmp_path / "out" / "train"), shard).keys) == shard.num_samples
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.*"))
    assert summary.num_bytes == size


def test_georeference_of_a_tile_is_the_georeference_of_its_window(tmp_path, leaf_image, on_earth, read_tars):
    pack([leaf_image(tmp_path / "field.tif", **on_earth)], tmp_path / "out", PackOptions(tile_px=32))
    for sample in read_tars(tmp_path / "out" / "train").values():
        row, col = sample["json"]["window"][:2]
        assert sample["json"]["crs"] == "EPSG:32643"
        expected = [0.02, 0, 578_000 + 0.02 * col, 0, -0.02, 3_419_000 - 0.02 * row]
        np.testing.assert_allclose(sample["json"]["transform"], expected, rtol=1e-12)


def test_images_of_the_same_name_have_different_keys_without_dots(tmp_path, leaf_image, read_tars):
    paths = ["a/leaf_0.5m.tif", "b/leaf_0.5m.tif", "b/leaf_0.7m.tif", "x/b/leaf_0.5m.tif", f"{'n' * 90}.tif"]
    images = [leaf_image(tmp_path / path, size_px=16, seed=i) for i, path in enumerate(paths)]
    summary = pack(images, tmp_path / "out", PackOptions(tile_px=8))
    keys = [key for split in summary.tiles for key in read_tars(tmp_path / "out" / split)]
    assert len(set(keys)) == len(keys) == sum(summary.tiles.values()) == 20
    names = {key.rsplit("_r", 1)[0] for key in keys}
    assert {"a_leaf_0_5m", "b_leaf_0_5m", "leaf_0_7m", "b_leaf_0_5m-2"} < names
    assert all(len(key) <= 80 for key in keys)


def test_tiles_below_the_coverage_and_images_below_a_tile_are_counted(tmp_path, leaf_image):
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    mask[32:36, :4] = True  # 16 of 1024 pixels of the third tile
    images = [leaf_image(tmp_path / "field.tif", mask=mask), leaf_image(tmp_path / "small.tif", size_px=24)]
    summary = pack(images, tmp_path / "out", PackOptions(tile_px=32, block_tiles=1, split=(1, 0, 0)))
    assert summary.dropped == {"coverage below 0.10": 2, "image smaller than a tile": 1}
    assert summary.tiles == {"train": 2}
    assert summary.coverage_mean == 1.0
    everything = pack([images[0]], tmp_path / "all", PackOptions(tile_px=32, min_coverage=0.0, split=(1, 0, 0)))
    assert everything.tiles == {"train": 3}
    assert everything.dropped == {"no leaf pixel": 1}


@pytest.mark.parametrize(("stride", "reached"), [(None, 64 * 64), (16, 112 * 112), (72, 64 * 64), (40, 104 * 104)])
def test_leaf_outside_the_grid_is_counted(tmp_path, leaf_image, stride, reached):
    image = leaf_image(tmp_path / "field.tif", size_px=120, mask=np.ones((120, 120), bool))
    options = PackOptions(tile_px=64, stride_px=stride, block_tiles=1, split=(1, 0, 0))
    summary = pack([image], tmp_path / "out", options)
    assert summary.leaf_pixels_covered == reached
    ((reason, count),) = summary.dropped.items()
    assert reason.startswith("leaf pixels that no whole tile of the grid reaches; use --tiling leaf")
    assert count == 120 * 120 - reached


def test_leaf_between_tiles_of_a_wide_stride_is_counted(tmp_path, leaf_image):
    image = leaf_image(tmp_path / "field.tif", size_px=64, mask=np.ones((64, 64), bool))
    summary = pack([image], tmp_path / "out", PackOptions(tile_px=16, stride_px=24, block_tiles=1, split=(1, 0, 0)))
    assert list(summary.dropped.values()) == [64 * 64 - 9 * 16 * 16]


def test_progress_never_goes_back_and_ends_at_its_total(tmp_path, leaf_image):
    seen: list[tuple[int, int]] = []
    report: Callable[[int, int], Any] = lambda done, total: seen.append((done, total))  # noqa: E731
    pack([leaf_image(tmp_path / "field.tif")], tmp_path / "out", PackOptions(tile_px=16, gap_px=0), report)
    shares = [done / total for done, total in seen]
    assert shares == sorted(shares) and seen[-1] == (32, 32) and len(seen) > 16


@pytest.mark.skipif(not RICE.is_dir(), reason="the rice field is not next to this repository")
def test_the_rice_field_packs_into_three_splits_without_a_shared_pixel(tmp_path, read_tars):
    options = PackOptions(
        band_files=RICE_BANDS, wavelengths_nm=(475, 560, 668, 717, 840), mask="ndvi>0.10", tile_px=128, gap_px=0
    )
    summary = pack([RICE], tmp_path / "out", options)
    assert 25 <= sum(summary.tiles.values()) <= 35
    assert set(summary.tiles) == set(SPLITS)
    assert summary.bands.names == ("blue", "green", "red", "red_edge", "nir")
    planes = []
    for name in RICE_BANDS:
        with rasterio.open(RICE / name) as opened:
            planes.append(opened.read(1))
    red, nir = planes[2].astype(np.float64), planes[4].astype(np.float64)
    leaf = (nir - red) / (nir + red) > 0.10
    times_used = np.zeros(leaf.shape, int)
    for split in SPLITS:
        for sample in read_tars(tmp_path / "out" / split).values():
            row, col, height, width = sample["json"]["window"]
            window = np.s_[row : row + height, col : col + width]
            times_used[window] += 1
            np.testing.assert_array_equal(sample["mask.png"], leaf[window])
            np.testing.assert_array_equal(sample["bands.npy"], np.stack([plane[window] for plane in planes]))
            assert sample["json"]["source"] == [f"rice/{name}" for name in RICE_BANDS]
    assert times_used.max() == 1
    about = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert about["wavelengths_nm"] == [475, 560, 668, 717, 840]


def test_the_coverage_histogram_counts_training_tiles(tmp_path, leaf_image, read_tars):
    images = [leaf_image(tmp_path / f"leaf{i}.tif", seed=i, mask=np.eye(64, k=9 * i) < 1) for i in range(5)]
    images.append(leaf_image(tmp_path / "half.tif", seed=9))
    pack(images, tmp_path / "out", PackOptions(tile_px=8))
    coverages = [sample["mask.png"].mean() for sample in read_tars(tmp_path / "out" / "train").values()]
    manifests = [Manifest.load(tmp_path / "out" / split) for split in SPLITS]
    assert sum(manifests[0].statistics.coverage_histogram) == manifests[0].num_samples
    for manifest in manifests:
        assert manifest.statistics.coverage_histogram == np.histogram(coverages, 10, (0, 1))[0].tolist()
