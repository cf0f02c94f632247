from __future__ import annotations

import statistics
from contextlib import closing
from itertools import islice
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msvae.shards.loader import Loader
from msvae.shards.order import MicroBatchPlan, SampleOrder, evaluation_plans, permutation, training_plans
from msvae.shards.reader import ShardReader

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any)


class Split(NamedTuple):
    """Division of a global batch among ranks."""

    world_size: int
    micro: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        return self.world_size * self.micro * self.accumulation


splits = st.builds(Split, st.integers(1, 64), st.integers(1, 4), st.integers(1, 3))


def samples_of_rank(sizes: list[int], seed: int, rank: int, split: Split, position: int, num_steps: int) -> list:
    """(position, slot, shard, row) of everything one rank sees in `num_steps` global batches."""
    plans = training_plans(
        SampleOrder(sizes, seed, window_shards=4),
        global_batch_size=split.global_batch,
        micro_batch_size=split.micro,
        rank=rank,
        world_size=split.world_size,
        position=position,
    )
    chosen = islice(plans, split.accumulation * num_steps)
    return [(plan.batch_index, p.slot, p.shard, p.row) for plan in chosen for p in plan.samples]


@given(shard_sizes, st.integers(0, 3), st.integers(0, 2**40))
def test_every_sample_is_read_exactly_once_per_epoch(sizes, epoch, seed):
    order = SampleOrder(sizes, seed, window_shards=3)
    start = epoch * order.num_samples
    seen = [order.locate(start + i) for i in range(order.num_samples)]
    assert sorted(seen) == [(shard, row) for shard, count in enumerate(sizes) for row in range(count)]


@given(shard_sizes, splits, st.integers(0, 50), st.integers(0, 2**40))
def test_global_batches_are_the_same_at_every_world_size(sizes, split, position, seed):
    one_batch = Split(1, split.global_batch, 1)
    alone = samples_of_rank(sizes, seed, 0, one_batch, position, num_steps=2)
    apart = [samples_of_rank(sizes, seed, rank, split, position, num_steps=2) for rank in range(split.world_size)]
    assert {len(samples) for samples in apart} == {2 * split.micro * split.accumulation}
    assert sorted(sample for samples in apart for sample in samples) == sorted(alone)


@given(shard_sizes, splits, st.integers(0, 20), st.data())
def test_all_ranks_together_read_every_sample_once_per_epoch(sizes, split, position, data):
    seed, num_samples = data.draw(st.integers(0, 2**40)), sum(sizes)
    num_steps = -(-2 * num_samples // split.global_batch)
    seen = [
        (shard, row, place * split.global_batch + slot)
        for rank in range(split.world_size)
        for place, slot, shard, row in samples_of_rank(sizes, seed, rank, split, position, num_steps)
    ]
    start = position * split.global_batch
    first_whole_epoch = -(-start // num_samples)
    of_epoch = sorted((shard, row) for shard, row, index in seen if index // num_samples == first_whole_epoch)
    assert of_epoch == [(shard, row) for shard, count in enumerate(sizes) for row in range(count)]


@given(shard_sizes, splits, st.integers(0, 30), st.data())
def test_a_start_at_any_position_continues_the_same_sequence(sizes, split, position, data):
    rank, seed = data.draw(st.integers(0, split.world_size - 1)), data.draw(st.integers(0, 2**40))
    whole = samples_of_rank(sizes, seed, rank, split, position=0, num_steps=position + 2)
    resumed = samples_of_rank(sizes, seed, rank, split, position=position, num_steps=2)
    assert resumed == whole[-len(resumed) :]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([(1, 8, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)]), st.integers(0, 3), st.integers(0, 40), st.data())
def test_batches_do_not_depend_on_the_number_of_workers(leaf_shards, split, num_workers, position, data):
    split = Split(*split)
    rank = data.draw(st.integers(0, split.world_size - 1))
    reader = ShardReader(leaf_shards / "train")
    expected = samples_of_rank(reader.samples_per_shard, 9, rank, split, position, num_steps=2)
    plans = training_plans(
        SampleOrder(reader.samples_per_shard, 9, window_shards=4),
        global_batch_size=split.global_batch,
        micro_batch_size=split.micro,
        rank=rank,
        world_size=split.world_size,
        position=position,
    )
    cpu = torch.device("cpu")
    with closing(iter(Loader(reader, plans, batch_size=split.micro, num_workers=num_workers, device=cpu))) as batches:
        keys = [key for batch in islice(batches, 2 * split.accumulation) for key in batch.keys]
    assert keys == [reader.key(shard, row) for _, _, shard, row in expected]


def test_batches_mix_shards_almost_as_well_as_a_uniform_shuffle():
    """Of 16 shards, 32 samples drawn at random touch 16 (1 - (15/16)^32) = 13.97."""
    order = SampleOrder([125] * 16, seed=0)
    batches = [{order.locate(batch * 32 + slot)[0] for slot in range(32)} for batch in range(62)]
    assert statistics.mean(map(len, batches)) >= 13.5


def test_the_order_never_changes_between_versions():
    """These numbers are part of the format, because existing runs must stay resumable."""
    assert permutation(8, 1, 2).tolist() == [7, 5, 6, 1, 4, 3, 0, 2]
    order = SampleOrder([3, 5, 2, 7], seed=11)
    assert [order.locate(i) for i in range(6)] == [(0, 2), (3, 3), (0, 0), (1, 3), (1, 4), (0, 1)]


def test_epochs_and_seeds_differ():
    order, other = SampleOrder([50, 50], seed=0), SampleOrder([50, 50], seed=1)
    first, second = ([order.locate(e * 100 + i) for i in range(100)] for e in range(2))
    assert first != second
    assert first != [other.locate(i) for i in range(100)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_reads_each_sample_once_in_batches_that_do_not_depend_on_ranks(world_size):
    sizes = [4, 1, 6]

    def plans(rank: int) -> list[MicroBatchPlan]:
        return list(evaluation_plans(sizes, batch_size=3, rank=rank, world_size=world_size))

    alone = list(evaluation_plans(sizes, batch_size=3, rank=0, world_size=1))
    together = sorted((plan for rank in range(world_size) for plan in plans(rank)), key=lambda plan: plan.batch_index)
    assert together == alone
    assert [sample.slot for plan in alone for sample in plan.samples] == list(range(11))
