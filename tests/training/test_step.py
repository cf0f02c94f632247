"""An optimizer step on one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from msvae import AutoencoderKLMultispectralAdapter
from msvae.config import Config, DataConfig, LossConfig, ModelConfig
from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import AutocastModel, LossScale
from msvae.model.build import TINY_BACKBONE
from msvae.shards.loader import Batch
from msvae.shards.order import MicroBatchPlan, SampleRef
from msvae.training.optim import make_optimizer
from msvae.training.step import Stepper
from msvae.training.trained_weights import ReplicatedWeights, norm_of

PLAN = MicroBatchPlan(0, (SampleRef(0, 0, 0), SampleRef(0, 1, 1)))


@pytest.fixture
def model() -> AutoencoderKLMultispectralAdapter:
    torch.manual_seed(0)
    return AutoencoderKLMultispectralAdapter(**TINY_BACKBONE, adapter_width=8, band_mean=[0.3] * 5, band_std=[0.1] * 5)


def make_stepper(
    model: AutoencoderKLMultispectralAdapter, config: Config, accelerator: Accelerator | None = None
) -> tuple[Stepper, Ranks]:
    accelerator = accelerator or Accelerator(cpu=True)
    model.choose_losses(tuple(config.loss.weights))
    ranks, optimizer = Ranks(accelerator), make_optimizer(model.train(), config.optim)
    trained = ReplicatedWeights(ranks, AutocastModel(model, "no"), optimizer, config.optim.max_grad_norm)
    return Stepper(config, ranks, model.leaf_losses, trained, optimizer, "no"), ranks


@pytest.mark.parametrize(("value", "changes"), [(0.4, True), (5e18, False)])
def test_a_step_with_an_infinite_loss_and_a_finite_gradient_changes_nothing(model, value, changes):
    config = Config(model=ModelConfig(train_backbone="all"), data=DataConfig(global_batch_size=2, micro_batch_size=2))
    stepper, ranks = make_stepper(model, config)
    tiles, leaf_mask = torch.rand(2, 5, 32, 32), torch.ones(2, 1, 32, 32, dtype=torch.bool)
    tiles[0, 2, 5, 5] = value
    batch = Batch(tiles, leaf_mask, ("a", "b"), PLAN)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    totals, norm = stepper.step([batch], ranks.all_reduce_sums(stepper.counts([batch])), 1.0)
    assert bool(torch.stack([total.isfinite().all() for total in totals.values()]).all()) == changes
    assert bool(norm.isfinite()) == changes
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(same) != changes


NONE = torch.zeros(2, 1, 32, 32, dtype=torch.bool)


@pytest.mark.parametrize(
    ("tiles", "leaf_mask", "weights"),
    [
        (torch.rand(2, 5, 32, 32), NONE, {}),
        (torch.full((2, 5, 32, 32), torch.nan), ~NONE, {}),
        (torch.zeros(2, 5, 32, 32), ~NONE, {"mse_weight": 0.0}),
        (torch.zeros(2, 5, 32, 32), ~NONE, {"mse_weight": 0.0, "kl_weight": 0.0, "range_weight": 1.0}),
    ],
    ids=["no leaf", "no finite value", "no spectrum", "no spectrum, range term"],
)
def test_a_step_without_leaf_values_to_compare_changes_nothing(model, tiles, leaf_mask, weights):
    """Moments of earlier steps, weight decay and terms that do not use the original have no effect either."""
    config = Config(
        model=ModelConfig(train_backbone="all"),
        data=DataConfig(global_batch_size=2, micro_batch_size=2),
        loss=LossConfig(**weights),
    )
    stepper, ranks = make_stepper(model, config)

    def step(tiles: torch.Tensor, leaf_mask: torch.Tensor) -> torch.Tensor:
        batch = Batch(tiles, leaf_mask, ("a", "b"), PLAN)
        return stepper.step([batch], ranks.all_reduce_sums(stepper.counts([batch])), 1.0)[1]

    assert step(torch.rand(2, 5, 32, 32), ~NONE).isfinite()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert not step(tiles, leaf_mask).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_never_reads_values_from_the_device(model):
    """Tensors on the meta device have no values, so reading one fails."""
    config = Config(
        model=ModelConfig(train_backbone="all", sample_posterior=False),
        data=DataConfig(global_batch_size=4, micro_batch_size=2),
        loss=LossConfig(**dict.fromkeys(LossConfig.model_fields, 1.0)),
    )
    model.enable_gradient_checkpointing()
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = torch.device("meta")
    try:
        stepper, ranks = make_stepper(model.to("meta"), config, accelerator)
        batch = Batch(torch.rand(2, 5, 32, 32).to("meta"), ~NONE.to("meta"), ("a", "b"), PLAN)
        for _ in range(2):
            totals, norm = stepper.step([batch, batch], ranks.all_reduce_sums(stepper.counts([batch, batch])), 1.0)
    finally:
        accelerator.state.device = torch.device("cpu")
    assert {value.device.type for value in (*totals.values(), norm)} == {"meta"}


def test_the_loss_scale_of_fp16_resumes_at_any_value():
    scale = LossScale("fp16", torch.device("cpu"))
    for _ in range(17):
        scale.update(torch.tensor(True))
    scale.update(torch.tensor(False))
    resumed = LossScale("fp16", torch.device("cpu"))
    resumed.load_state_dict(scale.state_dict())
    assert scale.state_dict() == resumed.state_dict() == {"grows": True, "value": 0.5, "finite_steps": 1.0}
    scale.update(torch.tensor(False))
    for number in (0.5, 1.0):
        scale.value.fill_(number)
        resumed.load_state_dict(scale.state_dict())
        assert resumed.state_dict() == scale.state_dict()


def test_norms_are_added_up_in_float64():
    """In float32 a norm over this many elements is 3e-4 too small."""
    values = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (7, 12_000_000)]
    expected = np.sqrt(sum(np.square(value.numpy().astype(np.float64)).sum() for value in values))
    assert float(norm_of(values)) == pytest.approx(expected, rel=1e-12)
