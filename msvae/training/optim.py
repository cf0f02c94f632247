"""The optimizer, which also averages the weights, and the learning rate as a pure function of the step."""

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
    """AdamW whose state also holds an exponential moving average of the weights, off when its decay is 0.

    So whatever splits the moments over ranks splits the average alike. Where `found_inf` is set to 1 a step changes
    nothing, and the host need not know (the convention of torch's gradient scaling).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, average_decay: float, **options: Any) -> None:
        super().__init__(groups, fused=True, **options)
        self.average_decay = average_decay
        self.found_inf: Tensor | None = None

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the tensors that are kept for each weight."""
        return (*MOMENTS, AVERAGE) if self.average_decay else MOMENTS

    @torch.no_grad()
    def begin(self, weights: Tensor, updates: int = 0) -> dict[str, Tensor]:
        """The state of `weights` after some updates, its tensors to be filled in."""
        state: dict[str, Tensor] = self.state[weights]
        state["step"] = torch.tensor(float(updates), device=weights.device)
        state |= {name: torch.zeros_like(weights, memory_format=torch.preserve_format) for name in MOMENTS}
        if self.average_decay:
            state[AVERAGE] = weights.detach().clone(memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the weights, then let the average follow."""
        stepped = [weights for group in self.param_groups for weights in group["params"] if weights.grad is not None]
        for weights in stepped:
            if not self.state[weights]:
                self.begin(weights)
        super().step(closure)
        if self.average_decay and stepped:
            states = [self.state[weights] for weights in stepped]
            # the decay rises over the first updates, as in diffusers' EMAModel
            updates = states[0]["step"]
            follow = torch.where(updates > 1, (9 / (updates + 9)).clamp(min=1 - self.average_decay), 1.0)
            if self.found_inf is not None:
                follow = follow * (1 - self.found_inf)
            averages = [state[AVERAGE] for state in states]
            differences = torch._foreach_sub(stepped, averages)
            torch._foreach_mul_(differences, follow)
            torch._foreach_add_(averages, differences)


def make_optimizer(model: AutoencoderKLMultispectralAdapter, config: OptimConfig) -> AveragingAdamW:
    """AdamW over the trainable parameters, in fused kernels; each group knows its `peak_lr`."""
    adapters, backbone = model.get_trainable_groups()
    backbone_lr = config.lr if config.backbone_lr is None else config.backbone_lr
    groups = [
        {"params": parameters, "lr": peak_lr, "peak_lr": peak_lr}
        for parameters, peak_lr in ((adapters, config.lr), (backbone, backbone_lr))
        if parameters
    ]
    return AveragingAdamW(groups, average_decay=config.ema_decay, betas=config.betas, weight_decay=config.weight_decay)


def schedule(step: int, max_steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at the step that follows `step` finished ones."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0
