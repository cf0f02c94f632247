"""Launched by a test: take one optimizer step as training does and keep its gradients and statistics."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from msvae.config import load_config
from msvae.engine import trainer as trainer_module
from msvae.engine.parallel.replicated import Replicated
from msvae.engine.precision import LossScale
from msvae.engine.setup import join

out, *overrides = sys.argv[1:]
build = trainer_module.build


@torch.no_grad()
def build_disturbed(*arguments: Any) -> torch.nn.Module:
    """Parts that begin at zero would hide others' gradients."""
    model = build(*arguments)
    for name, parameter in model.named_parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


trainer_module.build = build_disturbed
trainer = trainer_module.Trainer(load_config(None, overrides), join())
gradients: dict[str, torch.Tensor] = {}
update = trainer.trained.update


def keep_gradients(scale: LossScale) -> torch.Tensor:
    gradients.update({name: whole_gradient(weight).clone() for name, weight in trainer.trained.named.items()})
    return update(scale)


def whole_gradient(weight: torch.nn.Parameter) -> torch.Tensor:
    if isinstance(trainer.trained, Replicated):
        assert weight.grad is not None
        return weight.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(weight)


trainer.trained.update = keep_gradients
windows = trainer.stream.windows(trainer.step)
window = next(windows)
counts = trainer.ranks.sum(trainer.stepper.counts(window))
totals, norm = trainer.stepper.step(window, counts, 1e-3)
totals, _, _ = trainer._join(totals, next(windows), torch.zeros(()))
leaf_pixels = [int(batch.leaf_mask.sum()) for batch in window]
print(f"rank {trainer.ranks.rank}: leaf pixels of its micro batches {leaf_pixels}", file=sys.stderr)
if trainer.ranks.is_main:
    save_file(gradients, Path(out) / "gradients.safetensors")
    numbers = {f"total/{k}": v.tolist() for k, v in totals.items()} | {k: v.tolist() for k, v in counts.items()}
    (Path(out) / "numbers.json").write_text(json.dumps({**numbers, "grad_norm": float(norm)}))
