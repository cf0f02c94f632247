"""Launched by a test: take one optimizer step as training does and keep its gradients and statistics."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from msvae.config import load_config
from msvae.engine.setup import join
from msvae.engine.trainer import Trainer

out, *overrides = sys.argv[1:]
trainer = Trainer(load_config(None, overrides), join())
with torch.no_grad():
    for name, parameter in trainer.model.named_parameters():
        # parts that begin at zero would hide others' gradients
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
optimizer = trainer.stepper._optimizer
gradients: dict[str, torch.Tensor] = {}


def keep_gradients() -> None:
    gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})


optimizer.step = keep_gradients
windows = trainer.stream.windows(trainer.step)
window = next(windows)
counts = trainer.ranks.sum(trainer.stepper.counts(window))
totals, norm = trainer.stepper.step(window, counts, 1e-3)
totals, _ = trainer._join(totals, trainer.stepper.counts(next(windows)))
leaf_pixels = [int(batch.leaf_mask.sum()) for batch in window]
print(f"rank {trainer.ranks.rank}: leaf pixels of its micro batches {leaf_pixels}", file=sys.stderr)
if trainer.ranks.is_main:
    save_file(gradients, Path(out) / "gradients.safetensors")
    numbers = {f"total/{k}": v.tolist() for k, v in totals.items()} | {k: v.tolist() for k, v in counts.items()}
    (Path(out) / "numbers.json").write_text(json.dumps({**numbers, "grad_norm": float(norm)}))
