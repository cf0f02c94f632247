"""Spreads a model over the ranks in the way that the launcher asks for."""

from __future__ import annotations

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import AutocastModel
from msvae.training.optim import AveragingAdamW
from msvae.training.parallel.replicated import Replicated
from msvae.training.parallel.trained_weights import Trained


def spread(ranks: Ranks, model: AutocastModel, optimizer: AveragingAdamW, config: Config) -> Trained:
    """One process and DDP keep all weights on every rank, DeepSpeed splits them."""
    max_norm = config.optim.max_grad_norm
    if not ranks.engine.uses_deepspeed:
        return Replicated(ranks, model, optimizer, max_norm)
    # imported here: DeepSpeed looks for compilers when it is
    from msvae.training.parallel.zero import Zero

    accumulated = config.accumulation_steps(ranks.world_size)
    return Zero(ranks, model, optimizer, max_norm, accumulated, config.train.timeout_s)
