"""A training step of msvae on one process, as `Trainer` runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msvae import AutoencoderKLMultispectralAdapter
from msvae.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from msvae.distributed.precision import AutocastModel, Precision
from msvae.distributed.setup import join_ranks
from msvae.shards.loader import Batch
from msvae.shards.order import MicroBatchPlan, SampleRef
from msvae.training.optim import make_optimizer
from msvae.training.step import Stepper
from msvae.training.trained_weights import ReplicatedWeights

VARIANTS = ("eager", "channels-last", "checkpointing", "compiled", "output")
"""`output` is the adapter placement `output`, whose frozen encoder needs no autograd graph."""


def make_step(
    backbone: dict[str, object], variants: list[str], width: int, full: bool, device: torch.device,
    precision: Precision, batch_size: int,
) -> Callable[[Tensor, Tensor], float | None]:  # fmt: skip
    """Return a function that runs one step on tiles and leaf masks. No step waits for its loss."""
    config = Config(
        model=ModelConfig(train_backbone="all" if full else "none"),
        data=DataConfig(global_batch_size=batch_size, micro_batch_size=batch_size),
        optim=OptimConfig(ema_decay=0.0),
        train=TrainConfig(channels_last="channels-last" in variants),
    )
    placement = "output" if "output" in variants else "both"
    model = AutoencoderKLMultispectralAdapter(**backbone, adapter_placement=placement, adapter_width=width)
    model.choose_losses(tuple(config.loss.weights))
    if not full:
        model.freeze_backbone()
    if "checkpointing" in variants:
        model.enable_gradient_checkpointing()
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    model.to(device).train()
    if "compiled" in variants:
        model.compile()
    ranks, optimizer = join_ranks(), make_optimizer(model, config.optim)
    trained = ReplicatedWeights(ranks, AutocastModel(model, precision), optimizer, config.optim.max_grad_norm)
    stepper = Stepper(config, ranks, model.leaf_losses, trained, optimizer, precision)
    samples = tuple(SampleRef(0, slot, slot) for slot in range(batch_size))

    def step(tiles: Tensor, leaf_mask: Tensor) -> None:
        batch = Batch(tiles, leaf_mask, ("",) * batch_size, MicroBatchPlan(0, samples))
        counts = ranks.all_reduce_sums(stepper.counts([batch]))
        stepper.step([batch], counts, 1.0)

    return step
