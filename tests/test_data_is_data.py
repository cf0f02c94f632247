"""Shards and configurations are data: no pickle in them is loaded, and no command or code in them runs."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from PIL import Image

from msvae.config import load_config
from msvae.shards.audit.indexing import IndexOptions, index_dataset
from msvae.shards.audit.verify import verify_dataset
from msvae.shards.reader import ShardReader
from msvae.shards.wds_source import ExactSamples


def test_an_object_array_with_valid_checksums_is_refused(leaf_shards, tmp_path):
    split = Path(shutil.copytree(leaf_shards / "train", tmp_path / "train"))
    manifest = json.loads((split / "manifest.json").read_text())
    tar = split / manifest["shards"]["name"][0]
    index_path = tar.with_suffix(".index.json")
    index, content = json.loads(index_path.read_text()), bytearray(tar.read_bytes())

    def member(name: str) -> bytes:
        return bytes(content[index[f"{name}_offset"][0] :][: index[f"{name}_bytes"][0]])

    start = index["bands_offset"][0]
    content[start : start + 128] = content[start : start + 128].replace(b"'<u2'", b"'|O8'")
    index["crc32c"][0] = crc32c(member("mask"), crc32c(member("bands")))
    tar.write_bytes(content)
    index_path.write_text(json.dumps(index))
    manifest["shards"]["index_sha256"][0] = hashlib.sha256(index_path.read_bytes()).hexdigest()
    (split / "manifest.json").write_text(json.dumps(manifest))
    reader = ShardReader(split)
    tile, leaf_mask = np.empty(reader.tile_shape, reader.dtype), np.empty(reader.tile_shape[1:], bool)
    with pytest.raises(ValueError, match="is not a uint16 array"):
        reader.read_into(0, 0, tile, leaf_mask)
    reader.read_into(0, 1, tile, leaf_mask)


@pytest.mark.parametrize("name", ["../val/leaf-000000.tar", "/etc/passwd", ".hidden.tar", "..\\leaf.tar"])
def test_a_manifest_opens_no_file_outside_its_folder(leaf_shards, tmp_path, name):
    split = Path(shutil.copytree(leaf_shards / "train", tmp_path / "train"))
    manifest = json.loads((split / "manifest.json").read_text())
    manifest["shards"]["name"][0] = name
    (split / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: shards: .* is not a valid file name of a shard"):
        ShardReader(split)


@pytest.mark.parametrize("location", ["pipe:touch ran", "pipe:touch ran #://x"])
def test_no_location_runs_a_command(tmp_path, monkeypatch, location):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"holds no manifest\.json|cannot be opened"):
        ShardReader(location)
    assert not list(tmp_path.iterdir())


def test_a_path_in_a_member_name_is_a_key_and_never_opened(tmp_path):
    """Indexed, read, and given to webdataset stages: all under a name that points out of the folder."""
    split, outside = tmp_path / "split", tmp_path / "outside.npy"
    split.mkdir()
    tile, mask = io.BytesIO(), io.BytesIO()
    np.save(tile, np.ones((5, 16, 16), np.uint16))
    Image.fromarray(np.ones((16, 16), bool)).save(mask, "PNG")
    with tarfile.open(split / "a.tar", "w") as tar:
        for name, content in (
            ("../outside.npy", tile),
            ("../outside.png", mask),
            ("/etc/leaf.npy", tile),
            ("/etc/leaf.png", mask),
        ):
            header = tarfile.TarInfo(name)
            header.size = len(content.getvalue())
            tar.addfile(header, io.BytesIO(content.getvalue()))
    index_dataset(str(split), None, IndexOptions(wavelengths_nm=(475, 560, 668, 717, 840), scale=(1e-4,)))
    source = ExactSamples(split, seed=0, global_batch_size=2, micro_batch_size=2, num_positions=1)
    assert {sample["__key__"] for sample in source} == {"../outside", "/etc/leaf"}
    assert verify_dataset(str(split), num_threads=1).faults == []
    assert not outside.exists()
    assert sorted(path.name for path in split.iterdir()) == ["a.index.json", "a.tar", "manifest.json"]


def test_a_configuration_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("out: !!python/object/apply:os.system ['touch ran']")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(tmp_path / "run.yaml")
    assert not (tmp_path / "ran").exists()
