"""Every kind of damage is really done to a copy of packed shards, and named with file and sample."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from typer.testing import CliRunner

from msvae.cli import app
from msvae.shards.audit.verify import verify_dataset
from msvae.shards.reader import ShardReader
from msvae.shards.writer import ShardWriter

from .conftest import npy, png

TAR = "leaf-000000.tar"


def faults(location: Path) -> list[str]:
    found = verify_dataset(str(location), num_threads=2).faults
    assert all("\n" not in fault.message and ("; " in fault.message) for fault in found)
    return [f"{Path(fault.file).parent.name}/{Path(fault.file).name}: {fault.message}" for fault in found]


def index_of(split: Path, tar: str = TAR) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((split / tar).with_suffix(".index.json").read_text())
    return content


def seal(split: Path, tar: str = TAR, index: dict[str, Any] | None = None, **manifest_changes: Any) -> None:
    """Make hashes and sizes of index and manifest right again, as if the fault had been there from the start."""
    manifest = json.loads((split / "manifest.json").read_text()) | manifest_changes
    shards, number = manifest["shards"], manifest["shards"]["name"].index(tar)
    path = split / tar
    index = index or index_of(split, tar)
    index["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".index.json").write_text(json.dumps(index))
    shards["index_sha256"][number] = hashlib.sha256(path.with_suffix(".index.json").read_bytes()).hexdigest()
    shards["size_bytes"][number], shards["num_samples"][number] = path.stat().st_size, len(index["keys"])
    (split / "manifest.json").write_text(json.dumps(manifest))


def rewrite(split: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Write the first tar anew from changed members, with an index that lists each sample that has tile and mask."""
    with tarfile.open(split / TAR) as tar:
        members = change([(m.name, tar.extractfile(m).read()) for m in tar])  # type: ignore[union-attr]
    index: dict[str, Any] = {name: [] for name in index_of(split)}
    samples: list[tuple[str, dict[str, tuple[int, bytes]]]] = []
    with tarfile.open(split / TAR, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            key, ending = name.split(".", 1)
            if ending == "bands.npy":
                samples.append((key, {}))
            samples[-1][1][ending.split(".")[0]] = (tar.offset + 512, content)
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    for key, parts in samples:
        if "mask" in parts:
            index["keys"].append(key)
            for name in ("bands", "mask", "json"):
                index[f"{name}_offset"].append(parts[name][0])
                index[f"{name}_bytes"].append(len(parts[name][1]))
            index["crc32c"].append(crc32c(parts["mask"][1], crc32c(parts["bands"][1])))
            index["json_crc32c"].append(crc32c(parts["json"][1]))
    seal(split, TAR, index)


def flip(path: Path, *offsets: int) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture
def train(leaf_shards, tmp_path) -> Path:
    shutil.copytree(leaf_shards, tmp_path / "set")
    return tmp_path / "set" / "train"


def test_a_valid_dataset_has_no_fault_and_verify_prints_its_size(leaf_shards):
    assert faults(leaf_shards) == []
    result = CliRunner().invoke(app, ["verify", str(leaf_shards)])
    assert result.exit_code == 0, result.output
    manifest = json.loads((leaf_shards / "train" / "manifest.json").read_text())
    assert (
        f"train: sound; {len(manifest['shards']['name'])} shards, {sum(manifest['shards']['num_samples'])} tiles"
        in (result.output)
    )
    assert f"{manifest['statistics']['num_pixels']:,} leaf pixels" in result.output


def test_verify_prints_each_fault_and_exits_with_1(train):
    flip(train / TAR, index_of(train)["bands_offset"][2] + 500)
    (train.parent / "val" / TAR).unlink()
    result = CliRunner().invoke(app, ["verify", str(train.parent)])
    assert result.exit_code == 1
    assert f"{train / TAR}: sample {index_of(train)['keys'][2]} is altered" in result.output
    assert f"{train.parent / 'val' / TAR}: is missing" in result.output
    assert "3 faults in 2 files" in result.output


def test_samples_after_a_truncation_are_reported_as_lost(train):
    index = index_of(train)
    os.truncate(train / TAR, index["bands_offset"][3] + 700)
    size, cut, sha = faults(train.parent)[0], faults(train.parent)[1], faults(train.parent)[3]
    assert "has " in size
    assert "it was truncated or replaced" in size
    assert f"train/{TAR}: truncated in the data of {index['keys'][3]}.bands.npy" in cut
    lost = faults(train.parent)[2]
    assert f"{len(index['keys']) - 3} samples, from {index['keys'][3]} on, are lost" in lost
    assert "its SHA-256 differs from that in the index" in sha
    assert len(faults(train.parent)) == 4


def test_truncation_in_a_header_is_a_fault(train):
    os.truncate(train / TAR, index_of(train)["bands_offset"][3] - 100)
    assert any("truncated in a header" in fault for fault in faults(train.parent))


def test_truncation_between_samples_is_a_fault_even_if_sizes_and_hashes_match(train):
    index = index_of(train)
    os.truncate(train / TAR, index["bands_offset"][3] - 512)
    for name in index:
        if name != "sha256":
            index[name] = index[name][:3]
    seal(train, TAR, index)
    found = faults(train.parent)
    assert f"train/{TAR}: truncated between two members" in found[0]
    assert "statistics are of" in found[1]


@pytest.mark.parametrize("name", ["bands", "mask", "json"])
def test_flipped_bits_are_reported_by_sample_and_the_check_continues(train, name):
    index = index_of(train)
    flip(train / TAR, *(index[f"{name}_offset"][row] + 60 for row in (1, 4)))
    found = faults(train.parent)
    assert [f"sample {index['keys'][row]} is altered" in found[i] for i, row in enumerate((1, 4))] == [True, True]
    assert "SHA-256 differs from that in the index" in found[2]
    assert len(found) == 3


def test_flipped_bits_in_a_header_hide_no_later_fault(train):
    index = index_of(train)
    flip(train / TAR, index["bands_offset"][2] - 512 + 3, index["bands_offset"][5] + 900)
    found = faults(train.parent)
    assert f"the header at byte {index['bands_offset'][2] - 512:,} is altered" in found[0]
    assert f"sample {index['keys'][5]} is altered" in found[1]
    assert len(found) == 3


def test_flipped_bits_in_padding_are_found_by_the_hash(train):
    index = index_of(train)
    flip(train / TAR, index["json_offset"][0] + index["json_bytes"][0] + 2)
    assert ["SHA-256" in fault for fault in faults(train.parent)] == [True]


def test_a_missing_shard_index_or_manifest_is_a_fault(train):
    (train / TAR).unlink()
    (train / "leaf-000001.index.json").unlink()
    (train.parent / "val" / "manifest.json").write_text("{")
    found = faults(train.parent)
    assert "val/manifest.json: the file: Invalid JSON" in found[0]
    assert f"train/{TAR}: is missing" in found[1]
    assert "train/leaf-000001.index.json: is missing" in found[2]
    assert len(found) == 3


def test_an_altered_index_and_an_unlisted_tar_are_faults(train):
    flip(train / "leaf-000000.index.json", 20)
    shutil.copy(train / TAR, train / "more.tar")
    found = faults(train.parent)
    assert "train/more.tar: is not in the manifest" in found[0]
    assert "train/leaf-000000.index.json: was altered: its SHA-256 is not that in the manifest" in found[1]
    assert len(found) == 2


def test_a_shard_replaced_by_another_of_equal_size_is_a_fault(train):
    other = "leaf-000001.tar"
    assert (train / TAR).stat().st_size == (train / other).stat().st_size
    shutil.copy(train / other, train / TAR)
    found = faults(train.parent)
    keys = index_of(train)["keys"]
    other_keys = index_of(train, other)["keys"]
    for key, other_key in zip(keys, other_keys, strict=True):
        assert any(other_key in fault or key in fault for fault in found)
    assert any("SHA-256 differs from that in the index" in fault for fault in found)


def test_a_shard_that_differs_from_the_manifest_is_a_fault(train):
    manifest = json.loads((train / "manifest.json").read_text())
    manifest["shards"]["num_samples"][0] += 1
    (train / "manifest.json").write_text(json.dumps(manifest))
    assert "index.json: has columns of [7] samples, the manifest expects 8" in faults(train.parent)[0]


def test_a_tar_that_differs_from_its_index_is_a_fault(train):
    index = index_of(train)
    index["keys"][0], index["bands_bytes"][1] = "nobody", index["bands_bytes"][1] - 1
    seal(train, TAR, index)
    found = faults(train.parent)
    assert "has the key nobody in the index" in found[0]
    assert "where the index expects its bands" in found[1]


def test_duplicate_keys_are_faults(train):
    def twice(members):
        return members + [m for m in members if m[0].startswith(members[0][0].split(".")[0] + ".")]

    rewrite(train, twice)
    assert any("is not unique: it occurs 2 times, in leaf-000000.tar" in fault for fault in faults(train.parent))
    shutil.copy(train / TAR, train / "leaf-000001.tar")
    seal(train, "leaf-000001.tar", index_of(train))
    assert any("it occurs 4 times, in leaf-000000.tar, leaf-000001.tar" in fault for fault in faults(train.parent))


def test_a_sample_without_mask_is_a_fault(train):
    rewrite(train, lambda members: [m for m in members if m[0] != members[1][0]])
    key = index_of(train)["keys"]
    found = faults(train.parent)
    assert "is not at the offset in the index, or is not in the index" in found[0]
    assert key[0] not in found[0]
    (train / "leaf-000000.index.json").unlink()
    assert any("expected one .png as its mask" in fault for fault in faults(train.parent))


def changed(ending: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """One member of the second sample of the first tar, changed; hashes and checksums made to fit."""

    def apply(train: Path) -> None:
        key = index_of(train)["keys"][1]
        rewrite(train, lambda ms: [(n, change(c) if n == f"{key}.{ending}" else c) for n, c in ms])

    return apply


WRITTEN_WRONG = {
    "mask of another size": (changed("mask.png", lambda _: png(np.ones((32, 24), bool))), r"a mask of \(24, 32\) px"),
    "wrong dtype": (changed("bands.npy", lambda _: npy(np.ones((5, 32, 32), "<i2"))), "holds a int16 array"),
    "wrong band count": (changed("bands.npy", lambda _: npy(np.ones((4, 32, 32), "<u2"))), r"shape \(4, 32, 32\)"),
    "objects": (changed("bands.npy", lambda _: npy(np.array([{}], object))), "holds Python objects"),
    "JSON": (changed("json", lambda _: b"{'source': 1}"), "has a .json that does not parse"),
    "empty mask": (changed("mask.png", lambda _: png(np.zeros((32, 32), bool))), "has an empty mask"),
}


@pytest.mark.parametrize("fault", WRITTEN_WRONG)
def test_invalid_members_are_faults_even_if_all_checksums_match(train, fault):
    apply, message = WRITTEN_WRONG[fault]
    apply(train)
    found = faults(train.parent)
    assert found[0].startswith(f"train/{TAR}: sample {index_of(train)['keys'][1]} ")
    assert re.search(message, found[0])


def float_split(folder: Path, change: Callable[[np.ndarray, np.ndarray], None]) -> Path:
    """A split of one float32 shard, indexed by `msvae index`, whose second tile was changed."""
    folder.mkdir()
    with ShardWriter(folder / TAR) as writer:
        for row in range(3):
            tile, mask = np.full((2, 16, 16), 0.25 + row, np.float32), np.zeros((16, 16), bool)
            mask[:8] = True
            if row == 1:
                change(tile, mask)
            writer.write(f"t{row}", tile, mask, {})
    assert CliRunner().invoke(app, ["index", str(folder), "--wavelengths", "668,840"]).exit_code == 0
    return folder


def test_nan_and_inf_on_leaf_are_faults_and_on_background_are_counted(tmp_path):
    def on_leaf(tile, mask):
        tile[0, 0, :2] = np.nan, -np.inf

    def on_background(tile, mask):
        tile[:, 12, :3] = np.nan

    assert "sample t1 has 2 leaf pixels of NaN or infinity" in faults(float_split(tmp_path / "a", on_leaf))[0]
    background = float_split(tmp_path / "b", on_background)
    assert faults(background) == []
    assert "NaN or infinite: 3 background pixels of b" in CliRunner().invoke(app, ["verify", str(background)]).output


def test_statistics_that_differ_from_the_tiles_are_faults(train):
    manifest = json.loads((train / "manifest.json").read_text())
    statistics = manifest["statistics"]
    statistics["mean"][1] *= 1.00001
    (train / "manifest.json").write_text(json.dumps(manifest))
    found = faults(train.parent)
    assert "train/manifest.json: mean of the statistics is" in found[0]
    assert any("manifest.json: differs from that of train in statistics" in fault for fault in found[1:])


def test_an_empty_shard_is_a_fault(train):
    with tarfile.open(train / TAR, "w"):
        pass
    seal(train, TAR, {name: [] for name in index_of(train)})
    assert f"train/{TAR}: holds no sample" in faults(train.parent)[0]
    (train / TAR).write_bytes(b"")
    assert any(f"train/{TAR}: truncated between two members: it ends at byte 0" in f for f in faults(train.parent))


@pytest.mark.slow  # hashes 8 GiB
def test_samples_beyond_4_gib_are_indexed_read_and_verified(tmp_path):
    """A sparse file: 4 GiB of a member that is no part of any sample lie before the last two."""
    folder = tmp_path / "large"
    folder.mkdir()
    tiles = {f"t{i}": np.random.default_rng(i).integers(0, 4096, (5, 16, 16), dtype=np.uint16) for i in range(3)}
    mask = np.ones((16, 16), bool)
    with (folder / TAR).open("wb") as tar:
        for key, tile in tiles.items():
            for name, content in ((f"{key}.bands.npy", npy(tile)), (f"{key}.mask.png", png(mask))):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.write(header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
            if key == "t0":
                header = tarfile.TarInfo("t0.video")
                header.size = 2**32
                tar.write(header.tobuf(tarfile.USTAR_FORMAT))
                tar.seek(2**32, os.SEEK_CUR)
        tar.write(bytes(1024))
    assert (folder / TAR).stat().st_blocks * 512 < 10**6
    arguments = ["index", str(folder), "--wavelengths", "475,560,668,717,840", "--scale", "1"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert index_of(folder)["bands_offset"][1] > 2**32
    reader = ShardReader(folder)
    tile, leaf_mask = np.empty(reader.tile_shape, reader.dtype), np.empty((16, 16), bool)
    for row, key in enumerate(tiles):
        assert reader.read_into(0, row, tile, leaf_mask) == key
        np.testing.assert_array_equal(tile, tiles[key])
    assert faults(folder) == []


def test_a_split_without_manifest_is_a_fault(train):
    (train.parent / "val" / "manifest.json").unlink()
    assert [fault for fault in faults(train.parent) if "val/manifest.json: is missing, but there are tars" in fault]
