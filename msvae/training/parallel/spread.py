"""Spreads a model over the ranks in the way that the launcher asks for."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import InPrecision
from msvae.training.optim import AveragingAdamW
from msvae.training.parallel.replicated import Replicated
from msvae.training.parallel.trained_weights import Trained


def spread(
    accelerator: Accelerator, ranks: Ranks, model: InPrecision, optimizer: AveragingAdamW, config: Config
) -> Trained:
    """One process and DDP keep all weights on every rank, DeepSpeed splits them."""
    max_norm = config.optim.max_grad_norm
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return Replicated(accelerator, model, optimizer, max_norm)
    # imported here: DeepSpeed looks for compilers when it is
    from msvae.training.parallel.zero import Zero

    accumulated = config.accumulation_steps(ranks.world_size)
    return Zero(accelerator, ranks, model, optimizer, max_norm, accumulated, config.train.timeout_s)
