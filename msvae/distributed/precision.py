"""Mixed precision: which operations run in half precision, and the loss scale that fp16 gradients need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["no", "bf16", "fp16"]

GROW_AFTER = 2000
"""Consecutive finite steps after which the loss scale is doubled. It is halved after each step that is not finite.
torch's GradScaler has the same rules."""
FIRST_SCALE = 2.0**16


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which matrix products and convolutions run in half precision.

    Weights and sums stay float32.
    """
    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


class AutocastModel(nn.Module):
    """A model whose forward pass runs under autocast. DDP or DeepSpeed wrap this module.

    Autocast around DeepSpeed would have no effect, because DeepSpeed disables it on a GPU.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.model, self._precision = model, precision

    def forward(self, *, sample: Tensor, **options: Any) -> Any:
        """Run the forward pass of the model in the given precision."""
        with autocast(self._precision, sample.device):
            return self.model(sample=sample, **options)


class LossScale:
    """Factor by which the loss is multiplied and its gradient divided. It is always 1 unless gradients are fp16.

    The factor is a tensor on the device, so that no step waits for the device. Only DeepSpeed reads it on the host,
    once per micro batch.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.enabled = precision == "fp16"
        self.value = torch.tensor(FIRST_SCALE if self.enabled else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)

    def update(self, overflowed: Tensor) -> None:
        """Adapt the factor after a step. Args: a bool on the device, True if the gradient was not finite."""
        if not self.enabled:
            return
        self.finite_steps = torch.where(overflowed, 0.0, self.finite_steps + 1)
        grown = self.finite_steps >= GROW_AFTER
        factor = torch.where(overflowed, 0.5, torch.where(grown, 2.0, 1.0))
        self.value = self.value * factor
        self.finite_steps = torch.where(grown, 0.0, self.finite_steps)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"grows": self.enabled, "value": float(self.value), "finite_steps": float(self.finite_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the state of a checkpoint. The state of a run in another precision is ignored."""
        # a checkpoint of an earlier version has no `grows`
        if self.enabled and state.get("grows", state["value"] != 1.0):
            self.value.fill_(state["value"])
            self.finite_steps.fill_(state["finite_steps"])
