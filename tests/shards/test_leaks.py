"""No pixel stands in two splits without packing, or whoever asks, saying so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from msvae.bands import LeafStatistics
from msvae.shards.audit.leaks import check_leaks
from msvae.shards.manifest import Manifest, Shards
from msvae.shards.stores import open_store
from msvae.shards.writer import ShardWriter

UNIT = LeafStatistics(num_pixels=1, mean=[1], std=[1], minimum=[1], maximum=[1], covariance=[[1]])


@pytest.fixture
def split(tmp_path):
    def write(name, *samples):
        """Samples are (key, image file, window, value)."""
        folder = tmp_path / name
        folder.mkdir()
        with ShardWriter(folder / "leaf-000000.tar") as shard:
            for key, source, window, value in samples:
                about = {"source": [source], "window": list(window)} if source else {}
                shard.write(key, np.full((1, 8, 8), value, np.uint8), np.ones((8, 8), bool), about)
        Manifest(
            band_names=["red"], wavelengths_nm=[668], dtype="uint8", tile_px=8, scale=[1], offset=[0],
            statistics=UNIT, shards=Shards.of([shard.entry]),
        ).save(folder)  # fmt: skip
        return folder

    return write


def leaks(**splits: Path) -> list[str]:
    return check_leaks({name: open_store(folder) for name, folder in splits.items()})


def test_overlapping_windows_of_an_image_in_two_splits_are_an_error(split):
    train = split("train", ("a_r0_c0", "a.tif", (0, 0, 8, 8), 1), ("a_r0_c8", "a.tif", (0, 8, 8, 8), 2))
    clean = split("val", ("a_r8_c0", "a.tif", (8, 0, 8, 8), 3), ("b_r0_c0", "b.tif", (0, 0, 8, 8), 4))
    leaky = split("test", ("a_r7_c15", "a.tif", (7, 15, 8, 8), 5))
    assert leaks(train=train, val=clean) == []
    with pytest.raises(ValueError, match=r"a_r0_c8 \(train\).*a_r7_c15 \(test\) hold the same pixels of a\.tif"):
        leaks(train=train, test=leaky)


def test_images_with_one_name_in_two_folders_are_distinguished(split):
    train = split("train", ("x_a_r0_c0", "a.tif", (0, 0, 8, 8), 1))
    val = split("val", ("y_a_r0_c0", "a.tif", (0, 0, 8, 8), 2))
    assert leaks(train=train, val=val) == []


@pytest.mark.parametrize("source", ["b.tif", ""])
def test_identical_tiles_in_two_splits_are_an_error_with_both_keys(split, source):
    train = split("train", ("a_r0_c0", "a.tif", (0, 0, 8, 8), 1))
    val = split("val", ("b_r0_c0", source, (0, 0, 8, 8), 1))
    with pytest.raises(ValueError, match=r"a_r0_c0 \(train\) and b_r0_c0 \(val\) are the same tile, byte for byte"):
        leaks(train=train, val=val)


def test_identical_tiles_in_one_split_are_a_notice(split):
    train = split("train", *((f"a{i}_r0_c0", f"a{i}.tif", (0, 0, 8, 8), i // 3) for i in range(6)))
    assert leaks(train=train) == ["4 tiles are in train more than once, such as a0_r0_c0 and a1_r0_c0"]


def test_different_tiles_with_equal_checksums_are_not_a_leak(split, monkeypatch):
    monkeypatch.setattr("msvae.shards.writer.crc32c", lambda *_: 7)
    train = split("train", ("a_r0_c0", "a.tif", (0, 0, 8, 8), 1))
    val = split("val", ("b_r0_c0", "b.tif", (0, 0, 8, 8), 2))
    assert leaks(train=train, val=val) == []


@pytest.mark.parametrize("about", [{"source": None, "window": [0, 0, 8, 8]}, {"source": ["a.tif"], "window": "all"}])
def test_samples_without_a_window_in_their_json_are_compared_by_bytes(tmp_path, about):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name / "leaf-000000.tar") as shard:
            shard.write(f"{name}_r0_c0", np.full((1, 8, 8), len(name), np.uint8), np.ones((8, 8), bool), about)
        Manifest(
            band_names=["red"], wavelengths_nm=[668], dtype="uint8", tile_px=8, scale=[1], offset=[0],
            statistics=UNIT, shards=Shards.of([shard.entry]),
        ).save(tmp_path / name)  # fmt: skip
    assert leaks(train=tmp_path / "train", val=tmp_path / "val") == []
