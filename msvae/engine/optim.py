"""The optimizer, the learning rate as a pure function of the step, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from msvae.config import OptimConfig
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter


def make_optimizer(model: AutoencoderKLMultispectralAdapter, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, fused on CUDA; each group knows its `peak_lr`."""
    adapters, backbone = model.get_trainable_groups()
    backbone_lr = config.lr if config.backbone_lr is None else config.backbone_lr
    groups = [
        {"params": parameters, "lr": peak_lr, "peak_lr": peak_lr}
        for parameters, peak_lr in ((adapters, config.lr), (backbone, backbone_lr))
        if parameters
    ]
    on_cuda = all(parameter.is_cuda for parameter in (*adapters, *backbone))
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=on_cuda or None)


def schedule(step: int, max_steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at the step that follows `step` finished ones."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0


class MovingAverage:
    """Exponential moving average of the trained parameters; off when the decay is 0."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._average = EMAModel(parameters, decay=decay, foreach=True) if decay else None

    @property
    def values(self) -> list[torch.Tensor]:
        """One tensor a parameter, or none when off; written to by a resume."""
        return [] if self._average is None else self._average.shadow_params

    def update(self) -> None:
        """Follow the parameters after an optimizer step."""
        if self._average is not None:
            self._average.step(self._parameters)

    def resume(self, step: int) -> None:
        """Go on as after `step` updates: the decay rises over the first ones."""
        if self._average is not None:
            self._average.optimization_step = step

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model holds the averages."""
        if self._average is None:
            yield
            return
        raw = [parameter.detach().clone() for parameter in self._parameters]
        self._average.copy_to(self._parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, raw, strict=True):
                    parameter.copy_(value)
