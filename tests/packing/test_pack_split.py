"""No image and no block of neighbouring tiles is in two splits."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.packing.splits import assign_splits

SPLITS = ("train", "val", "test")


def sources_and_windows(read_tars, out):
    return {
        split: [(s["json"]["source"][0], *s["json"]["window"][:2]) for s in read_tars(out / split).values()]
        for split in SPLITS
        if (out / split).is_dir()
    }


def test_three_images_are_split_by_image(tmp_path, leaf_image, read_tars):
    images = [leaf_image(tmp_path / f"leaf{i}.tif", seed=i) for i in range(3)]
    summary = pack(images, tmp_path / "out", PackOptions(tile_px=16))
    tiles = sources_and_windows(read_tars, tmp_path / "out")
    assert summary.split_by == "image"
    assert sorted(len({source for source, *_ in tiles[split]}) for split in SPLITS) == [1, 1, 1]
    assert summary.tiles == {"train": 16, "val": 16, "test": 16}


def test_one_image_is_split_by_whole_blocks(tmp_path, leaf_image, read_tars):
    image = leaf_image(tmp_path / "field.tif", size_px=160)
    summary = pack([image], tmp_path / "out", PackOptions(tile_px=16, block_tiles=2, gap_px=0))
    tiles = sources_and_windows(read_tars, tmp_path / "out")
    blocks = [{(row // 32, col // 32) for _, row, col in tiles[split]} for split in SPLITS]
    assert summary.split_by == "block"
    assert not any(a & b for a, b in pairwise([*blocks, blocks[0]]))
    assert [summary.tiles[split] for split in SPLITS] == pytest.approx([70, 15, 15], abs=4)
    all_tiles = [tile for split in SPLITS for tile in tiles[split]]
    assert len(set(all_tiles)) == len(all_tiles) == 100


@pytest.mark.parametrize("stride_px", [None, 8, 4])
def test_overlapping_tiles_are_split_in_the_same_shares(tmp_path, leaf_image, stride_px):
    image = leaf_image(tmp_path / "field.tif", size_px=256)
    options = PackOptions(tile_px=16, stride_px=stride_px, gap_px=0, min_coverage=0.0)
    summary = pack([image], tmp_path / "out", options)
    shares = np.array([summary.tiles[split] for split in SPLITS]) / sum(summary.tiles.values())
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.12)


def test_tiles_keep_the_order_of_their_source(tmp_path, leaf_image, read_tars):
    images = [leaf_image(tmp_path / f"leaf{i}.tif", seed=i) for i in range(2)]
    pack(images, tmp_path / "out", PackOptions(tile_px=16, block_tiles=1))
    for tiles in sources_and_windows(read_tars, tmp_path / "out").values():
        assert tiles == sorted(tiles)


def test_the_seed_determines_the_split(tmp_path, leaf_image, read_tars):
    image = leaf_image(tmp_path / "field.tif")
    drawn = []
    for seed in (0, 1):
        pack([image], tmp_path / f"out{seed}", PackOptions(tile_px=8, block_tiles=1, seed=seed))
        drawn.append(sources_and_windows(read_tars, tmp_path / f"out{seed}")["train"])
    assert drawn[0] != drawn[1]


def test_a_split_without_tiles_is_omitted_with_a_notice(tmp_path, leaf_image):
    image = leaf_image(tmp_path / "field.tif")
    summary = pack([image], tmp_path / "out", PackOptions(tile_px=16, split_by="image"))
    assert summary.tiles == {"train": 16}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact-sheet.png", "train"]
    assert sum("split: too few images" in notice for notice in summary.notices) == 2


def test_groups_are_assigned_near_the_shares_and_no_split_is_empty():
    rng = np.random.default_rng(6)
    for _ in range(200):
        sizes = rng.integers(1, 20, rng.integers(1, 60)).tolist()
        shares = rng.dirichlet([2, 1, 1]).tolist()
        assigned = np.array(assign_splits(sizes, shares, int(rng.integers(100))))
        counts = np.bincount(assigned, weights=sizes, minlength=3)
        assert counts[0] > 0
        if len(sizes) >= 3:
            assert (counts > 0).all()
        assert np.abs(counts - np.multiply(shares, sum(sizes))).max() <= 2 * max(sizes)
    assert set(assign_splits([1] * 100, (0.8, 0.2, 0), 0)) == {0, 1}


def test_all_tiles_of_a_plant_stay_together(tmp_path, leaf_image, read_tars):
    for plant in range(5):
        for day in range(3):
            leaf_image(tmp_path / f"day{day}" / f"plant_{plant:02d}_leaf.tif", seed=10 * plant + day)
    folders = [tmp_path / f"day{day}" for day in range(3)]
    summary = pack(folders, tmp_path / "out", PackOptions(tile_px=16, group_by=r"plant_(\d+)"))
    samples = {split: read_tars(tmp_path / "out" / split).values() for split in SPLITS}
    plants = {split: {sample["json"]["group"] for sample in samples[split]} for split in SPLITS}
    assert summary.split_by == "group"
    assert sorted(len(plants[split]) for split in SPLITS) == [1, 1, 3]
    assert set.union(*plants.values()) == {f"{plant:02d}" for plant in range(5)}
    for split in SPLITS:
        for sample in samples[split]:
            assert sample["json"]["source"][0].split("_")[1] in plants[split]


def test_an_image_without_a_group_is_named(tmp_path, leaf_image):
    images = [leaf_image(tmp_path / name, seed=i) for i, name in enumerate(("plant_1.tif", "soil.tif"))]
    with pytest.raises(ValueError, match=r"--group-by plant_\\d finds no group in .*soil\.tif"):
        pack(images, tmp_path / "out", PackOptions(tile_px=16, group_by=r"plant_\d"))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png", ".png", ".tif", ".tif"]


@pytest.mark.parametrize(("stride", "gap_px"), [(16, 0), (16, 1), (16, 20), (8, 0), (8, 1), (12, 5)])
def test_tiles_of_different_splits_in_one_image_are_the_gap_apart(tmp_path, leaf_image, read_tars, stride, gap_px):
    image = leaf_image(tmp_path / "field.tif", size_px=256)
    options = PackOptions(tile_px=16, stride_px=stride, gap_px=gap_px)
    summary = pack([image], tmp_path / "out", options)
    tiles = sources_and_windows(read_tars, tmp_path / "out")
    for one, other in ((one, other) for one in SPLITS for other in SPLITS if one < other):
        first, second = (np.array([tile[1:] for tile in tiles[split]]) for split in (one, other))
        between_px = np.abs(first[:, None] - second[None]).max(axis=-1) - 16
        assert between_px.min() >= gap_px
    num_places = len(range(0, 256 - 15, stride)) ** 2
    assert sum(summary.tiles.values()) + summary.num_in_gap == num_places
    assert summary.num_in_gap == sum(count for reason, count in summary.dropped.items() if "nearer than" in reason)
    assert (summary.num_in_gap > 0) is (gap_px > 0 or stride < 16)
    assert sum(summary.tiles.values()) > num_places / 2


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"split_by": "image"}, "too few images .*; pack more images, or give --split-by block$"),
        ({"split_by": "block"}, "too few blocks .*; pack more images, or give a smaller --tile$"),
        ({"group_by": "leaf"}, "too few groups .*; pack images of more groups, or give another --group-by$"),
    ],
)
def test_an_empty_split_is_reported_with_an_option_that_fills_it(tmp_path, leaf_image, options, hint):
    image = leaf_image(tmp_path / "leaf.tif", size_px=16)
    summary = pack([image], tmp_path / "out", PackOptions(tile_px=16, **options))
    assert [bool(re.search(hint, notice)) for notice in summary.notices] == [True, True]


def test_a_folder_that_all_images_share_is_not_a_group(tmp_path, leaf_image):
    """The name of that folder may match the pattern."""
    folder = tmp_path / "plant_9"
    for plant in range(4):
        for side in "ab":
            leaf_image(folder / f"plant_{plant}_{side}.tif", size_px=32, seed=8 * plant + ord(side))
    summary = pack([folder], tmp_path / "out", PackOptions(tile_px=16, group_by=r"plant_(\d)"))
    assert len(summary.tiles) == 3, "four plants are enough for three splits"
    alone = pack([folder], tmp_path / "alone", PackOptions(tile_px=16, group_by=r"plant_(9)", split=(1, 0, 0)))
    assert alone.tiles == {"train": 32}
