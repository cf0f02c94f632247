"""A step on one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from msvae import AutoencoderKLMultispectralAdapter
from msvae.config import Config, DataConfig, ModelConfig
from msvae.engine.optim import make_optimizer
from msvae.engine.parallel.replicated import Replicated
from msvae.engine.parallel.trained import norm_of
from msvae.engine.precision import InPrecision
from msvae.engine.ranks import Ranks
from msvae.engine.step import Stepper
from msvae.model.build import TINY_BACKBONE
from msvae.shards.loader import Batch
from msvae.shards.order import MicroBatchPlan, Place

PLAN = MicroBatchPlan(0, (Place(0, 0, 0), Place(0, 1, 1)))


@pytest.fixture
def model() -> AutoencoderKLMultispectralAdapter:
    torch.manual_seed(0)
    return AutoencoderKLMultispectralAdapter(**TINY_BACKBONE, adapter_width=8, band_mean=[0.3] * 5, band_std=[0.1] * 5)


@pytest.mark.parametrize(("value", "changes"), [(0.4, True), (5e18, False)])
def test_a_step_whose_loss_is_infinite_changes_nothing_though_its_gradient_is_finite(model, value, changes):
    config = Config(model=ModelConfig(train_backbone="all"), data=DataConfig(global_batch_size=2, micro_batch_size=2))
    model.choose_losses(tuple(config.loss.weights))
    ranks, optimizer = Ranks(Accelerator(cpu=True)), make_optimizer(model.train(), config.optim)
    trained = Replicated(Accelerator(cpu=True), InPrecision(model, "no"), optimizer, config.optim.max_grad_norm)
    stepper = Stepper(config, ranks, model.leaf_losses, trained, optimizer, "no")
    tiles, leaf_mask = torch.rand(2, 5, 32, 32), torch.ones(2, 1, 32, 32, dtype=torch.bool)
    tiles[0, 2, 5, 5] = value
    batch = Batch(tiles, leaf_mask, ("a", "b"), PLAN)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    totals, norm = stepper.step([batch], ranks.sum(stepper.counts([batch])), 1.0)
    assert bool(torch.stack([total.isfinite().all() for total in totals.values()]).all()) == changes
    assert bool(norm.isfinite()) == changes
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(same) != changes


def test_norms_are_added_up_in_float64():
    """In float32 a norm over this many elements is 3e-4 too small."""
    values = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (7, 12_000_000)]
    expected = np.sqrt(sum(np.square(value.numpy().astype(np.float64)).sum() for value in values))
    assert float(norm_of(values)) == pytest.approx(expected, rel=1e-12)
