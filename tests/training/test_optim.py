from __future__ import annotations

import math

import pytest
import torch

from msvae.config import OptimConfig
from msvae.training.optim import AveragingAdamW, schedule


def shares(course: str, warmup_steps: int, max_steps: int) -> list[float]:
    config = OptimConfig(schedule=course, warmup_steps=warmup_steps)
    return [schedule(step, max_steps, config) for step in range(max_steps)]


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    cosine, linear, constant = (shares(course, 4, 14) for course in ("cosine", "linear", "constant"))
    for values in (cosine, linear, constant):
        assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
        assert values[4] == 1.0
    assert cosine[4:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 10) for k in range(10)])
    assert linear[4:] == pytest.approx([1 - 0.1 * k for k in range(10)])
    assert constant[4:] == [1.0] * 10


def test_the_learning_rate_of_a_run_shorter_than_its_warm_up_only_rises():
    assert shares("cosine", 100, 3) == pytest.approx([0.01, 0.02, 0.03])


def stepped(optimizer: AveragingAdamW, parameter: torch.nn.Parameter, gradient: float) -> torch.Tensor:
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return optimizer.state[parameter]


def test_the_average_follows_the_weights():
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = AveragingAdamW([{"params": [parameter], "lr": 0.5}], average_decay=0.9)
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(1, 30):
        state = stepped(optimizer, parameter, gradient=(-1.0) ** (step // 4))
        # the decay rises over the first updates: min(decay, step / (step + 9)), step counting updates before this one
        decay = min(0.9, step / (step + 9)) if step > 1 else 0.0
        expected = decay * expected + (1 - decay) * parameter.detach().double()
        torch.testing.assert_close(state["average"].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(state["average"], parameter)


def test_weights_are_updated_as_by_adamw():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    optimizer = AveragingAdamW([{"params": [ours], "lr": 0.1}], average_decay=0.0, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, foreach=False)
    for step in range(5):
        state = stepped(optimizer, ours, gradient=step - 2.5)
        theirs.grad = torch.full_like(theirs, step - 2.5)
        reference.step()
        torch.testing.assert_close(ours, theirs)
    assert "average" not in state


def test_a_step_with_infinite_gradients_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AveragingAdamW([{"params": [parameter], "lr": 0.1}], average_decay=0.9, weight_decay=0.1)
    for _ in range(3):
        state = stepped(optimizer, parameter, gradient=1.0)
    before = {name: value.clone() for name, value in state.items()} | {"weights": parameter.detach().clone()}
    optimizer.found_inf = torch.tensor(1.0)
    after = stepped(optimizer, parameter, gradient=torch.inf) | {"weights": parameter.detach()}
    assert after.keys() == before.keys() == {"step", "exp_avg", "exp_avg_sq", "average", "weights"}
    assert all(torch.equal(before[name], after[name]) for name in before)
