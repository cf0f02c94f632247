from __future__ import annotations

import json
import os
import shutil
import tarfile
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds

from msvae.shards.loader import Loader
from msvae.shards.order import evaluation_plans
from msvae.shards.reader import ShardReader
from msvae.shards.stores import local

from .conftest import npy, png
from .test_verify import TAR, index_of, rewrite

CPU = torch.device("cpu")
FOUND_WHILE_TRAINING = {
    "mask of another size": (
        "mask.png",
        png(np.ones((32, 24), bool)),
        r"has a mask of \(24, 32\) px, expected \(32, 32\)",
    ),
    "colour mask": (
        "mask.png",
        png(np.zeros((32, 32, 3), np.uint8)),
        "has a mask of mode RGB, expected one grey value",
    ),
    "no mask": ("mask.png", b"JFIF", "has a mask that is not a PNG"),
    "wrong dtype": (
        "bands.npy",
        npy(np.ones((5, 32, 32), "u1")),
        r"holds 5248 bytes, expected 10368 for uint16 tiles",
    ),
    "wrong dtype of equal size": ("bands.npy", npy(np.ones((5, 32, 32), "<i2")), "is not a uint16 array of shape"),
    "wrong band count": ("bands.npy", npy(np.ones((4, 32, 32), "<u2")), r"for uint16 tiles of shape \(5, 32, 32\)"),
}


def all_batches(folder: Path, batch_size: int = 4, num_workers: int = 2) -> list:
    reader = ShardReader(folder)
    plans = evaluation_plans(reader.samples_per_shard, batch_size=batch_size, rank=0, world_size=1)
    return list(Loader(reader, plans, batch_size=batch_size, num_workers=num_workers, device=CPU))


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("msvae-reader")]


def plain_webdataset(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("l8")
    return {s["__key__"]: (s["bands.npy"], np.asarray(s["mask.png"]) > 0) for s in dataset}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_hold_the_samples_that_plain_webdataset_reads(leaf_shards, num_workers):
    folder = leaf_shards / "train"
    scale = json.loads((folder / "manifest.json").read_text())["scale"]
    stored, seen = plain_webdataset(folder), {}
    for batch in all_batches(folder, num_workers=num_workers):
        for key, tile, leaf_mask in zip(batch.keys, batch.tiles, batch.leaf_mask, strict=True):
            seen[key] = (tile.numpy(), leaf_mask[0].numpy())
    assert seen.keys() == stored.keys()
    for key, (tile, leaf_mask) in seen.items():
        expected = stored[key][0].astype(np.float64) * np.array(scale)[:, None, None]
        np.testing.assert_allclose(tile, expected, rtol=1e-6)
        np.testing.assert_array_equal(leaf_mask, stored[key][1])


def test_stored_values_become_reflectance_by_scale_and_offset(leaf_shards, tmp_path):
    folder = shutil.copytree(leaf_shards / "train", tmp_path / "train")
    manifest = json.loads((folder / "manifest.json").read_text())
    scale, offset = np.array([1e-4, 2e-4, 3e-4, 1e-4, 5e-4]), np.array([0.01, -0.2, 0.0, 0.3, 1.0])
    (folder / "manifest.json").write_text(json.dumps({**manifest, "scale": scale.tolist(), "offset": offset.tolist()}))
    stored = plain_webdataset(folder)
    for batch in all_batches(folder):
        for key, tile in zip(batch.keys, batch.tiles, strict=True):
            expected = stored[key][0] * scale[:, None, None] + offset[:, None, None]
            np.testing.assert_allclose(tile, expected, rtol=1e-6, atol=1e-7)


def test_later_batches_do_not_overwrite_a_batch(leaf_shards):
    reader = ShardReader(leaf_shards / "train")
    plans = evaluation_plans(reader.samples_per_shard, batch_size=2, rank=0, world_size=1)
    loader = iter(Loader(reader, plans, batch_size=2, num_workers=1, device=CPU))
    first = next(loader)
    tiles, leaf_mask = first.tiles.clone(), first.leaf_mask.clone()
    list(loader)
    assert torch.equal(first.tiles, tiles)
    assert torch.equal(first.leaf_mask, leaf_mask)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_is_reused_only_after_its_last_view_is_freed(leaf_shards, num_workers):
    reader = ShardReader(leaf_shards / "train")
    sizes = reader.samples_per_shard
    plans = (p for _ in range(8) for p in evaluation_plans(sizes, batch_size=2, rank=0, world_size=1))
    kept, addresses = [], []
    for i, batch in enumerate(Loader(reader, plans, batch_size=2, num_workers=num_workers, device=CPU)):
        addresses.append(batch.tiles.data_ptr())
        if i % 9 == 0:  # a slice alone, its batch is let go
            kept.append(
                (batch.tiles[1:, 2], batch.tiles[1:, 2].clone(), batch.leaf_mask[0], batch.leaf_mask[0].clone())
            )
    for tiles, expected_tiles, leaf_mask, expected_mask in kept:
        assert torch.equal(tiles, expected_tiles)
        assert torch.equal(leaf_mask, expected_mask)
    assert len(addresses) > 80
    assert len(set(addresses)) <= len(kept) + 2 * max(1, num_workers) + 3


def test_no_more_shards_stay_open_than_allowed(leaf_shards, monkeypatch):
    monkeypatch.setattr(local, "MAX_OPEN_FILES", 1)
    expected = [key for batch in all_batches(leaf_shards / "train") for key in batch.keys]
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    reader = ShardReader(leaf_shards / "train")
    assert len(reader.samples_per_shard) > 2
    plans = evaluation_plans(reader.samples_per_shard, batch_size=4, rank=0, world_size=1)
    loader = Loader(reader, plans, batch_size=4, num_workers=0, device=CPU)
    assert [key for batch in loader for key in batch.keys] == expected
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_before + 1


def test_stopping_early_ends_the_reader_threads(leaf_shards):
    reader = ShardReader(leaf_shards / "train")
    plans = evaluation_plans(reader.samples_per_shard, batch_size=2, rank=0, world_size=1)
    batches = iter(Loader(reader, plans, batch_size=2, num_workers=2, device=CPU))
    assert len(list(islice(batches, 2))) == 2
    assert reader_threads()
    batches.close()
    assert not reader_threads()


class TestFaults:
    """Every fault is one error with the file and the fix."""

    @pytest.fixture
    def split(self, leaf_shards, tmp_path) -> Path:
        return Path(shutil.copytree(leaf_shards / "train", tmp_path / "train"))

    @staticmethod
    def first_tar(split: Path) -> Path:
        return min(split.glob("*.tar"))

    def test_a_truncated_shard_is_named(self, split):
        tar = self.first_tar(split)
        os.truncate(tar, tar.stat().st_size - 10_240)
        with pytest.raises(ValueError, match=rf"{tar.name} has \d+ bytes, the manifest expects \d+.*pack"):
            all_batches(split)

    def test_a_missing_shard_is_named(self, split):
        tar = self.first_tar(split)
        tar.unlink()
        with pytest.raises(ValueError, match=rf"{tar.name} is missing"):
            all_batches(split)

    @pytest.mark.parametrize("member", ["bands.npy", "mask.png"])
    def test_a_flipped_bit_names_shard_and_sample(self, split, member):
        tar = self.first_tar(split)
        with tarfile.open(tar) as archive:
            victim = next(m for m in archive if m.name.endswith(member))
        content = bytearray(tar.read_bytes())
        content[victim.offset_data + victim.size // 2] ^= 1
        tar.write_bytes(content)
        key = victim.name.split(".")[0]
        with pytest.raises(ValueError, match=rf"{tar.name}: sample {key} is truncated or altered"):
            all_batches(split)

    def test_an_altered_index_is_named(self, split):
        index = self.first_tar(split).with_suffix(".index.json")
        index.write_text(index.read_text().replace("0,", "1,", 1))
        with pytest.raises(ValueError, match=rf"{index.name} was altered"):
            all_batches(split)

    def test_a_folder_without_manifest_says_how_to_make_one(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds no manifest\.json; make shards with `msvae pack"):
            ShardReader(tmp_path)

    def test_an_empty_split_is_an_error(self, split):
        manifest = json.loads((split / "manifest.json").read_text())
        (split / "manifest.json").write_text(
            json.dumps({**manifest, "shards": {column: [] for column in manifest["shards"]}})
        )
        with pytest.raises(ValueError, match="lists no samples; this split is empty"):
            ShardReader(split)

    def test_a_manifest_that_contradicts_itself_is_an_error_with_the_fields(self, split):
        manifest = json.loads((split / "manifest.json").read_text())
        (split / "manifest.json").write_text(json.dumps({**manifest, "scale": [1.0]}))
        with pytest.raises(ValueError, match=r"different numbers of bands: .*'scale': 1"):
            ShardReader(split)

    def test_a_foreign_manifest_names_the_field(self, split):
        (split / "manifest.json").write_text('{"format": "other"}')
        with pytest.raises(ValueError, match=r"manifest\.json: "):
            ShardReader(split)

    def test_a_manifest_that_lists_a_shard_twice_is_refused(self, split):
        manifest = json.loads((split / "manifest.json").read_text())
        for column in manifest["shards"].values():
            column.append(column[0])
        (split / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"manifest\.json: shards: .*lists leaf-000000\.tar 2 times.*pack this"):
            ShardReader(split)

    def test_a_shard_replaced_by_another_of_equal_size_is_named(self, split):
        tar, other = self.first_tar(split), sorted(split.glob("*.tar"))[1].read_bytes()
        size = tar.stat().st_size
        tar.write_bytes(other[:size].ljust(size, b"\0"))
        with pytest.raises(ValueError, match=rf"{tar.name}: sample \S+ is truncated or altered: checksum"):
            all_batches(split)

    @pytest.mark.parametrize("fault", FOUND_WHILE_TRAINING)
    def test_a_wrongly_written_sample_stops_training_even_if_all_checksums_match(self, split, fault):
        ending, content, message = FOUND_WHILE_TRAINING[fault]
        key = index_of(split)["keys"][1]
        rewrite(split, lambda members: [(n, content if n == f"{key}.{ending}" else old) for n, old in members])
        with pytest.raises(ValueError, match=message) as error:
            all_batches(split)
        assert f"{TAR}: sample {key} " in str(error.value)
        assert "pack this split again" in str(error.value)


def test_json_of_a_sample_is_read_and_an_altered_one_is_an_error(leaf_shards, tmp_path):
    split = tmp_path / "train"
    shutil.copytree(leaf_shards / "train", split)
    about = ShardReader(split).json_object(0, 1)
    assert about["window"][2:] == [32, 32]
    assert about["group"]
    index = json.loads((split / "leaf-000000.index.json").read_text())
    with (split / "leaf-000000.tar").open("r+b") as tar:
        tar.seek(index["json_offset"][1])
        tar.write(b"\xff")
    reader = ShardReader(split)
    assert reader.json_object(0, 0)["window"][2:] == [32, 32]
    with pytest.raises(
        ValueError, match=rf"leaf-000000.tar: the JSON of sample {reader.key(0, 1)} is truncated or altered"
    ):
        reader.json_object(0, 1)
