"""The optimizer, which also averages the weights, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from msvae.config import OptimConfig
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"


class AveragingAdamW(torch.optim.AdamW):
    """AdamW whose state also holds an exponential moving average of the weights. A decay of 0 turns the average off.

    The average is optimizer state, so that DeepSpeed shards it like the moments. If `found_inf` is 1, a step changes
    nothing. `found_inf` is a tensor on the device, so the host does not wait for it (as in torch's GradScaler).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, average_decay: float, **options: Any) -> None:
        super().__init__(groups, fused=True, **options)
        self.average_decay = average_decay
        self.found_inf: Tensor | None = None

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the tensors that the optimizer stores for each weight."""
        return (*MOMENTS, AVERAGE) if self.average_decay else MOMENTS

    @torch.no_grad()
    def init_state(self, weights: Tensor) -> None:
        """Create the state of a tensor of weights before its first update."""
        state: dict[str, Tensor] = self.state[weights]
        state["step"] = torch.tensor(0.0, device=weights.device)
        state |= {name: torch.zeros_like(weights, memory_format=torch.preserve_format) for name in MOMENTS}
        if self.average_decay:
            state[AVERAGE] = weights.detach().clone(memory_format=torch.preserve_format)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the weights, then their average."""
        updated = [weights for group in self.param_groups for weights in group["params"] if weights.grad is not None]
        for weights in updated:
            if not self.state[weights]:
                self.init_state(weights)
        super().step(closure)
        if self.average_decay and updated:
            states = [self.state[weights] for weights in updated]
            # the decay rises over the first updates, as in diffusers' EMAModel
            updates = states[0]["step"]
            factor = torch.where(updates > 1, (9 / (updates + 9)).clamp(min=1 - self.average_decay), 1.0)
            if self.found_inf is not None:
                factor = factor * (1 - self.found_inf)
            averages = [state[AVERAGE] for state in states]
            differences = torch._foreach_sub(updated, averages)
            torch._foreach_mul_(differences, factor)
            torch._foreach_add_(averages, differences)


def make_optimizer(model: AutoencoderKLMultispectralAdapter, config: OptimConfig) -> AveragingAdamW:
    """Return an optimizer of the trainable parameters. Each parameter group stores its `peak_lr`."""
    adapters, backbone = model.get_trainable_groups()
    backbone_lr = config.lr if config.backbone_lr is None else config.backbone_lr
    groups = [
        {"params": parameters, "lr": peak_lr, "peak_lr": peak_lr}
        for parameters, peak_lr in ((adapters, config.lr), (backbone, backbone_lr))
        if parameters
    ]
    return AveragingAdamW(groups, average_decay=config.ema_decay, betas=config.betas, weight_decay=config.weight_decay)


def schedule(step: int, max_steps: int, config: OptimConfig) -> float:
    """Return the factor on the peak learning rate after `step` finished steps."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0
