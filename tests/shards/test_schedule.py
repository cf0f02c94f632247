from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from msvae.cli import app
from msvae.shards.loader import Loader
from msvae.shards.manifest import Manifest
from msvae.shards.order import SampleOrder, training_plans
from msvae.shards.reader import ShardReader
from msvae.shards.schedule import Cluster, shuffle_windows, simulate

from ..servers import BUCKET, breaking_proxy, set_credentials


def bytes_read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_shuffle_windows_equal_the_order_of_samples():
    sizes = np.random.default_rng(0).integers(0, 9, 40)
    order = SampleOrder(sizes.tolist(), seed=3, window_shards=7)
    windows = islice(shuffle_windows(sizes, seed=3, window_shards=7), 15)
    places = [(int(s), int(r)) for shards, rows in windows for s, r in zip(shards, rows, strict=True)]
    assert len(places) > 2 * sizes.sum()
    assert places == [order.locate(index) for index in range(len(places))]


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (2, 2), (4, 1)])
def test_ranks_read_the_simulated_bytes(leaf_shards, nodes, gpus):
    """Compares the samples, and the bytes that the operating system counts, for the loader of every rank."""
    folder, batch, steps = leaf_shards / "train", 8, 4
    cluster = Cluster(nodes, gpus, batch)
    schedule = simulate(Manifest.load(folder), cluster, seed=5, num_steps=steps)
    assert schedule.num_steps == steps
    manifest = json.loads((folder / "manifest.json").read_text())
    indexes = [json.loads((folder / n).with_suffix(".index.json").read_text()) for n in manifest["shards"]["name"]]
    shard_of = {key: shard for shard, index in enumerate(indexes) for key in index["keys"]}
    share_of_tar = [s / len(i["keys"]) for s, i in zip(manifest["shards"]["size_bytes"], indexes, strict=True)]
    span_bytes = {  # tile, mask, and the header between them
        key: index["mask_offset"][row] + index["mask_bytes"][row] - index["bands_offset"][row]
        for index in indexes
        for row, key in enumerate(index["keys"])
    }
    touched: list[set[int]] = [set() for _ in range(nodes)]
    tar_bytes = np.zeros((steps, nodes))
    visits: Counter[tuple[int, int, int]] = Counter()
    for rank in range(nodes * gpus):
        reader = ShardReader(folder)
        for shard in range(len(indexes)):  # what follows counts bytes of tars
            reader.key(shard, 0)
        plans = training_plans(
            SampleOrder(reader.samples_per_shard, 5),
            global_batch_size=batch,
            micro_batch_size=1,
            rank=rank,
            world_size=nodes * gpus,
            position=0,
        )
        plans = islice(plans, steps * batch // (nodes * gpus))
        loader = Loader(reader, plans, batch_size=1, num_workers=0, device=torch.device("cpu"))
        before, node, keys = bytes_read_by_this_process(), rank // gpus, []
        overhead = bytes_read_by_this_process() - before
        before = bytes_read_by_this_process()
        for read in loader:
            keys.append(read.keys[0])
            tar_bytes[read.plan.batch_index, node] += share_of_tar[shard_of[keys[-1]]]
            visits[read.plan.batch_index, node, shard_of[keys[-1]]] += 1
        assert bytes_read_by_this_process() - before - overhead == sum(span_bytes[key] for key in keys)
        assert len(keys) == schedule.rank_samples[rank]
        touched[node] |= {shard_of[key] for key in keys}
    np.testing.assert_allclose(schedule.step_bytes, tar_bytes)
    assert schedule.node_shards.tolist() == [len(shards) for shards in touched]
    sizes = manifest["shards"]["size_bytes"]
    assert schedule.node_shard_bytes.tolist() == [sum(sizes[shard] for shard in shards) for shards in touched]
    distinct = Counter((step, node) for step, node, _ in visits)
    assert {(s, n): int(schedule.step_shards[s, n]) for s in range(steps) for n in range(nodes)} == distinct
    for node in range(nodes):
        held = [0] * steps
        for shard in touched[node]:
            when = [step for step, n, s in visits if (n, s) == (node, shard)]
            for step in range(min(when), max(when) + 1):
                held[step] += sizes[shard]
        assert schedule.node_cache_bytes[node] == max(held)


def test_loaders_make_the_simulated_requests(leaf_shards, moto, monkeypatch):
    """One request for the manifest and the counted ones: none for sizes, and none for open indexes."""
    nodes, gpus, batch, steps = 2, 2, 8, 3
    schedule = simulate(Manifest.load(leaf_shards / "train"), Cluster(nodes, gpus, batch), seed=5, num_steps=steps)
    with breaking_proxy(*moto) as (url, requests):
        set_credentials(monkeypatch, url)
        for node in range(nodes):
            requests.set("", times=0, path="/")
            for rank in range(node * gpus, (node + 1) * gpus):
                reader = ShardReader(f"s3://{BUCKET}/field/shards/train")
                order = SampleOrder(reader.samples_per_shard, 5)
                plans = training_plans(
                    order,
                    global_batch_size=batch,
                    micro_batch_size=2,
                    rank=rank,
                    world_size=nodes * gpus,
                    position=0,
                )
                plans = islice(plans, steps * batch // (nodes * gpus * 2))
                num_tiles = sum(
                    len(read.keys)
                    for read in Loader(reader, plans, batch_size=2, num_workers=2, device=torch.device("cpu"))
                )
                assert num_tiles == schedule.rank_samples[rank]
            num_tiles = schedule.rank_samples.reshape(nodes, gpus)[node].sum()
            assert requests.num_requests == gpus + num_tiles + schedule.step_indexes[:, node].sum()
    assert schedule.step_indexes.sum() > nodes * gpus, "each rank reads from several shards"


def test_an_indivisible_global_batch_is_an_error_with_a_valid_one():
    with pytest.raises(ValueError, match=r"100 cannot be divided among 16 GPUs in micro batches of 2; .*such as 96"):
        Cluster(2, 8, 100, 2)


def test_simulate_shows_nodes_and_checks_the_cache_size(leaf_shards):
    arguments = ["simulate", str(leaf_shards), "--nodes", "2", "--gpus", "2", "--global-batch", "8"]
    result = CliRunner().invoke(app, [*arguments, "--micro-batch", "1", "--cache-gb", "0.000001"])
    assert result.exit_code == 0, result.output
    assert "2 micro batches of 1 per GPU and step" in result.output
    assert "is too small to hold what a node needs" in result.output
    assert "tiles per node and step" in result.output


def test_a_global_batch_larger_than_the_dataset_is_refused(leaf_shards):
    num_tiles = Manifest.load(leaf_shards / "train").num_samples
    arguments = ["simulate", str(leaf_shards), "--nodes", "1", "--gpus", "1", "--global-batch"]
    assert CliRunner().invoke(app, [*arguments, str(num_tiles)]).exit_code == 0
    refused = CliRunner().invoke(app, [*arguments, str(num_tiles + 1)])
    assert refused.exit_code == 2
    assert f"global batch {num_tiles + 1} is more than the {num_tiles} tiles of the dataset" in refused.output
