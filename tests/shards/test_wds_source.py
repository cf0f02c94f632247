"""The exact stream under webdataset's own stages."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from msvae.shards.cache import SpanCache
from msvae.shards.loader import Loader
from msvae.shards.order import SampleOrder, training_plans
from msvae.shards.reader import ShardReader
from msvae.shards.wds_source import ExactSamples

from ..conftest import ROOT
from ..servers import BUCKET, breaking_proxy, set_credentials
from .test_reader import CPU

STREAM = {"seed": 3, "global_batch_size": 8, "micro_batch_size": 2}


def keys_of_loader(folder: Path, rank: int, world_size: int, position: int, num_positions: int) -> list[str]:
    reader = ShardReader(folder)
    order = SampleOrder(reader.samples_per_shard, STREAM["seed"])
    plans = training_plans(
        order, global_batch_size=8, micro_batch_size=2, rank=rank, world_size=world_size, position=position
    )
    keys = []
    for batch in Loader(reader, plans, batch_size=2, num_workers=1, device=CPU):
        if batch.plan.batch_index == position + num_positions:
            return keys
        keys += batch.keys
    raise AssertionError


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (3, 4)])
def test_samples_arrive_in_training_order(leaf_shards, rank, world_size):
    source = ExactSamples(
        leaf_shards / "train", **STREAM, rank=rank, world_size=world_size, position=4, num_positions=3
    )
    expected = keys_of_loader(leaf_shards / "train", rank, world_size, 4, 3)
    assert [sample["__key__"] for sample in source] == expected


def test_stages_of_webdataset_decode_select_and_map(leaf_shards):
    def darker(sample: dict) -> dict:
        return {**sample, "bands.npy": sample["bands.npy"] // 2}

    source = ExactSamples(leaf_shards / "train", **STREAM, num_positions=4)
    pipeline = wds.DataPipeline(
        source, wds.decode("l8"), wds.select(lambda sample: sample["json"]["coverage"] > 0.3), wds.map(darker)
    )
    plain = wds.WebDataset(sorted(map(str, (leaf_shards / "train").glob("*.tar"))), shardshuffle=False).decode("l8")
    stored = {sample["__key__"]: sample for sample in plain}
    expected = [s["__key__"] for s in source if json.loads(s["json"])["coverage"] > 0.3]
    seen = list(pipeline)
    assert [sample["__key__"] for sample in seen] == expected
    assert 0 < len(expected) < 32
    for sample in seen:
        np.testing.assert_array_equal(sample["bands.npy"], stored[sample["__key__"]]["bands.npy"] // 2)
        np.testing.assert_array_equal(sample["mask.png"], stored[sample["__key__"]]["mask.png"])


def test_worker_processes_keep_the_order_of_micro_batches(leaf_shards):
    source = ExactSamples(leaf_shards / "train", **STREAM, num_positions=6)
    pipeline = wds.DataPipeline(source, wds.decode("l8"), wds.to_tuple("__key__", "bands.npy"), wds.batched(2))
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=3)
    assert [key for keys, _ in loader for key in keys] == keys_of_loader(leaf_shards / "train", 0, 1, 0, 6)


def flip_a_json(split: Path) -> str:
    """Change the coverage that a JSON states, which still parses; returns the key."""
    index, tar = json.loads((split / "leaf-000000.index.json").read_text()), split / "leaf-000000.tar"
    content, offset = bytearray(tar.read_bytes()), index["json_offset"][1]
    content[content.index(b'"coverage": 0.', offset) + len(b'"coverage": 0.')] ^= 1
    tar.write_bytes(content)
    return str(index["keys"][1])


def test_an_altered_json_is_an_error(leaf_shards, tmp_path):
    split = Path(shutil.copytree(leaf_shards / "train", tmp_path / "train"))
    key = flip_a_json(split)
    with pytest.raises(ValueError, match=rf"leaf-000000\.tar: the JSON of sample {key} is truncated or altered"):
        list(ExactSamples(split, **STREAM, num_positions=6))


def test_bad_samples_are_replaced_as_in_training_with_a_warning(leaf_shards, tmp_path):
    split = Path(shutil.copytree(leaf_shards / "train", tmp_path / "train"))
    key = flip_a_json(split)
    sound = [sample["__key__"] for sample in ExactSamples(leaf_shards / "train", **STREAM, num_positions=6)]
    following = json.loads((split / "leaf-000000.index.json").read_text())["keys"][2]
    with pytest.warns(UserWarning, match=rf"{following} replaces {key}: .*the JSON of sample {key} is truncated or"):
        seen = list(ExactSamples(split, **STREAM, num_positions=6, max_bad_samples=1))
    assert [sample["__key__"] for sample in seen] == [following if name == key else name for name in sound]


def test_cached_samples_are_read_without_the_server(leaf_shards, moto, tmp_path, monkeypatch):
    cache = SpanCache(tmp_path / "cache", 10**8)
    with breaking_proxy(*moto) as (url, fault):
        set_credentials(monkeypatch, url)
        source = ExactSamples(f"s3://{BUCKET}/field/shards/train", **STREAM, num_positions=2, cache=cache)
        first = list(source)
        fault.set("500", 10**6, path=".tar")
        assert list(source) == first
        assert fault.num_requests == 0
    assert [sample["json"] for sample in first] == [
        sample["json"] for sample in ExactSamples(leaf_shards / "train", **STREAM, num_positions=2)
    ]


def test_an_index_from_before_json_had_checksums_is_still_read(leaf_shards, tmp_path):
    split = Path(shutil.copytree(leaf_shards / "train", tmp_path / "train"))
    manifest = json.loads((split / "manifest.json").read_text())
    for shard, name in enumerate(manifest["shards"]["name"]):
        path = (split / name).with_suffix(".index.json")
        index = json.loads(path.read_text())
        del index["json_crc32c"]
        path.write_text(json.dumps(index))
        manifest["shards"]["index_sha256"][shard] = hashlib.sha256(path.read_bytes()).hexdigest()
    (split / "manifest.json").write_text(json.dumps(manifest))
    expected = list(ExactSamples(leaf_shards / "train", **STREAM, num_positions=2))
    for old, new in zip(ExactSamples(split, **STREAM, num_positions=2), expected, strict=True):
        assert {**old, "__url__": ""} == {**new, "__url__": ""}


def test_an_indivisible_global_batch_is_an_error(leaf_shards):
    with pytest.raises(ValueError, match="global_batch_size is 8, expected a multiple of 3 ranks x"):
        ExactSamples(leaf_shards / "train", **STREAM, world_size=3)


def test_the_example_in_the_docs_filters_and_augments(leaf_shards):
    text = (ROOT / "docs" / "streaming.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("shards/leaves/train", str(leaf_shards / "train")), names)
    assert names["tiles"].shape == (8, 5, 32, 32)
    assert names["masks"].shape == (8, 32, 32)
    assert (names["masks"] > 0).mean(axis=(1, 2)).min() > 0.5
