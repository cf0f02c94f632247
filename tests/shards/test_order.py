from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msvae.shards.order import MicroBatchPlan, SampleOrder, evaluation_plans, permutation, training_plans

shard_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=20)


def rank_samples(sizes: list[int], rank: int, world_size: int, micro: int, position: int, num_steps: int) -> list:
    """(position, slot, shard, row) of everything one rank sees in `num_steps` global batches of 24."""
    order = SampleOrder(sizes, seed=5, window_shards=4)
    plans = training_plans(
        order, global_batch_size=24, micro_batch_size=micro, rank=rank, world_size=world_size, position=position
    )
    micro_batches = 24 // world_size // micro * num_steps
    return [(plan.position, p.slot, p.shard, p.row) for plan in islice(plans, micro_batches) for p in plan.places]


@given(shard_sizes, st.integers(0, 3), st.integers(0, 2**40))
def test_every_sample_is_seen_exactly_once_in_every_epoch(sizes, epoch, seed):
    order = SampleOrder(sizes, seed, window_shards=3)
    start = epoch * order.num_samples
    seen = [order.place(start + i) for i in range(order.num_samples)]
    assert sorted(seen) == [(shard, row) for shard, count in enumerate(sizes) for row in range(count)]


@given(shard_sizes, st.sampled_from([(1, 24), (1, 4), (2, 6), (3, 8), (4, 2), (8, 1), (24, 1)]))
def test_global_batches_are_the_same_at_every_world_size(sizes, split):
    world_size, micro = split
    alone = rank_samples(sizes, 0, 1, 24, position=0, num_steps=3)
    together = [s for rank in range(world_size) for s in rank_samples(sizes, rank, world_size, micro, 0, 3)]
    assert sorted(together) == sorted(alone)


@given(shard_sizes, st.integers(0, 30))
def test_starting_at_a_position_equals_never_having_stopped(sizes, position):
    whole = rank_samples(sizes, 1, 2, 4, position=0, num_steps=position + 2)
    resumed = rank_samples(sizes, 1, 2, 4, position=position, num_steps=2)
    assert resumed == whole[-len(resumed) :]


def test_the_order_never_changes_between_versions():
    """Runs of the past must stay resumable: these numbers are part of the format."""
    assert permutation(8, 1, 2).tolist() == [7, 5, 6, 1, 4, 3, 0, 2]
    order = SampleOrder([3, 5, 2, 7], seed=11)
    assert [order.place(i) for i in range(6)] == [(0, 2), (3, 3), (0, 0), (1, 3), (1, 4), (0, 1)]


def test_epochs_and_seeds_differ():
    order, other = SampleOrder([50, 50], seed=0), SampleOrder([50, 50], seed=1)
    first, second = ([order.place(e * 100 + i) for i in range(100)] for e in range(2))
    assert first != second
    assert first != [other.place(i) for i in range(100)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_sees_each_sample_once_in_batches_that_ignore_the_ranks(world_size):
    sizes = [4, 1, 6]

    def plans(rank: int) -> list[MicroBatchPlan]:
        return list(evaluation_plans(sizes, batch_size=3, rank=rank, world_size=world_size))

    alone = list(evaluation_plans(sizes, batch_size=3, rank=0, world_size=1))
    together = sorted((plan for rank in range(world_size) for plan in plans(rank)), key=lambda plan: plan.position)
    assert together == alone
    assert [place.slot for plan in alone for place in plan.places] == list(range(11))
