"""Mixed precision: which operations run in half precision, and the scale that keeps half gradients above zero."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["no", "bf16", "fp16"]

GROW_AFTER = 2000
"""Finite steps in a row after which the scale doubles; it halves after every other one. Both as torch's GradScaler."""
FIRST_SCALE = 2.0**16


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Within it, matrix products and convolutions run in half precision; weights and sums stay float32."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


class InPrecision(nn.Module):
    """A model whose forward pass runs in a precision.

    It is what DDP and DeepSpeed wrap: DeepSpeed turns off on a GPU what is turned on around it.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.model, self._precision = model, precision

    def forward(self, *, sample: Tensor, **options: Any) -> Any:
        """That of the model."""
        with autocast(self._precision, sample.device):
            return self.model(sample=sample, **options)


class LossScale:
    """A factor on the loss that is taken off the gradients again. 1 for ever unless gradients are fp16.

    It lives on the device, so that no step waits for the host; DeepSpeed alone wants it there for each micro batch.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.grows = precision == "fp16"
        self.value = torch.tensor(FIRST_SCALE if self.grows else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)

    def follow(self, overflowed: Tensor) -> None:
        """After a step whose gradients were, or were not, finite."""
        if not self.grows:
            return
        self.finite_steps = torch.where(overflowed, 0.0, self.finite_steps + 1)
        grown = self.finite_steps >= GROW_AFTER
        factor = torch.where(overflowed, 0.5, torch.where(grown, 2.0, 1.0))
        self.value = self.value * factor
        self.finite_steps = torch.where(grown, 0.0, self.finite_steps)

    def state(self) -> dict[str, float]:
        """To be saved."""
        return {"grows": self.grows, "value": float(self.value), "finite_steps": float(self.finite_steps)}

    def resume(self, state: dict[str, float]) -> None:
        """Go on from a saved state; of a run in another precision nothing is taken."""
        if self.grows and state.get("grows", state["value"] != 1.0):
            self.value.fill_(state["value"])
            self.finite_steps.fill_(state["finite_steps"])
