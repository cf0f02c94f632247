"""The collectives of a training step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..conftest import tiny_run

SCRIPT = Path(__file__).with_name("count_collectives.py")
STEPS = 6


@pytest.mark.parametrize(
    "engine", ["cpu", "zero2", *(pytest.param(f"zero{n}", marks=pytest.mark.slow) for n in (1, 3))]
)
def test_a_step_has_one_collective_besides_those_of_its_gradients_and_no_broadcast(
    launch, leaf_shards, tmp_path, engine
):
    arguments = tiny_run(
        leaf_shards,
        tmp_path / "run",
        data__val="null",
        data__micro_batch_size=2,
        data__check_every=2,
        train__log_every=2,
        train__max_steps=STEPS,
        train__checkpoint_every=0,
    )
    done = launch(SCRIPT, tmp_path, *arguments, processes=2, engine=engine)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == STEPS + 1
    # in the first step DDP arranges its buckets, and after the last step the run is saved
    for row in ranks[0][1:STEPS]:
        assert [(name, kind) for name, kind, _ in row["other"]] == [("allreduce_", "torch.float64")]
        assert row["gradients"], "gradients are reduced"
        # the sums of the run are float64 and hold two numbers per tile; ZeRO 3 reduces its norm in float64
        assert all(count == 1 for _, kind, count in row["gradients"] if kind == "torch.float64")
        assert not any("broadcast" in name for name, *_ in row["gradients"])
    # every step sends the same amount, logged or not
    assert len({json.dumps(row["gradients"]) for row in ranks[0][1:STEPS]}) == 1
