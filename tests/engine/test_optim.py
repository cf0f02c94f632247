from __future__ import annotations

import math

import pytest
import torch

from msvae.config import OptimConfig
from msvae.engine.optim import MovingAverage, schedule


def shares(course: str, warmup_steps: int, max_steps: int) -> list[float]:
    config = OptimConfig(schedule=course, warmup_steps=warmup_steps)
    return [schedule(step, max_steps, config) for step in range(max_steps)]


def test_the_rate_rises_to_its_peak_and_falls_to_nothing():
    cosine, linear, constant = (shares(course, 4, 14) for course in ("cosine", "linear", "constant"))
    for values in (cosine, linear, constant):
        assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
        assert values[4] == 1.0
    assert cosine[4:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 10) for k in range(10)])
    assert linear[4:] == pytest.approx([1 - 0.1 * k for k in range(10)])
    assert constant[4:] == [1.0] * 10


def test_a_run_shorter_than_its_warm_up_only_rises():
    assert shares("cosine", 100, 3) == pytest.approx([0.01, 0.02, 0.03])


def test_the_average_follows_and_gives_the_weights_back():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage([parameter], decay=0.9)
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(1, 30):
        with torch.no_grad():
            parameter += 1
        average.update()
        # the decay rises over the first updates: min(decay, step / (step + 9)), step counting updates before this one
        decay = min(0.9, step / (step + 9)) if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * parameter.detach().double()
    raw = parameter.detach().clone()
    with average.in_place():
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(parameter, raw)


def test_no_average_leaves_the_weights_as_they_are():
    parameter = torch.nn.Parameter(torch.ones(3))
    average = MovingAverage([parameter], decay=0.0)
    average.update()
    with average.in_place():
        assert torch.equal(parameter, torch.ones(3))
    assert average.values == []
