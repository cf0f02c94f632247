"""Launched by a test: runs one optimizer step of training for each case, and stores its gradients and sums.

Arguments: a folder, the cases as JSON, and the options of a run. A case is a name and the options that it changes. The
`precision` is `float32`, `float64` (weights and tiles), or `wide` (float64 operations on float32 weights). With
`half_empty`, only the first quarter of the tiles of a batch has leaf.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from msvae.config import load_config
from msvae.distributed.precision import LossScale
from msvae.distributed.setup import join_ranks
from msvae.shards.loader import Batch
from msvae.training import trainer as trainer_module
from msvae.training.trained_weights import ReplicatedWeights
from msvae.training.trainer import Trainer

folder, cases, *overrides = sys.argv[1:]
build_on_device = trainer_module.build_on_device
linear = functional.linear


class Wide(TorchFunctionMode):
    """Runs the operations with weights in float64."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.conv2d, linear, functional.group_norm):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.double, (args, kwargs))
        return function(*args, **kwargs)


def record(name: str, precision: str, half_empty: bool, changed: list[str]) -> None:
    @torch.no_grad()
    def build_disturbed(*arguments: Any) -> torch.nn.Module:
        """Build a model without weights of zero, which would hide the gradients of other weights."""
        model = build_on_device(*arguments)
        for name, parameter in model.named_parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        return model.double() if precision == "float64" else model

    trainer_module.build_on_device = build_disturbed
    trainer = Trainer(load_config(None, [*overrides, "--out", f"{folder}/run-{name}", *changed]), ranks)
    if precision == "wide":
        # the function by which ZeRO 3 replaces it needs equal types
        functional.linear = linear
        forward = trainer.stepper._forward

        def wide_forward(batch: Batch) -> Any:
            with Wide():
                return forward(batch)

        trainer.stepper._forward = wide_forward
    gradients: dict[str, torch.Tensor] = {}
    update = trainer.trained.update

    def keep_gradients(scale: LossScale) -> torch.Tensor:
        gradients.update(
            {name: whole_gradient(trainer, weight).clone().contiguous() for name, weight in named.items()}
        )
        return update(scale)

    named = trainer.trained.parameters
    trainer.trained.update = keep_gradients
    global_batches = trainer.stream.global_batches(trainer.step)
    micro_batches = [prepared(batch, precision, 4 if half_empty else 16) for batch in next(global_batches)]
    counts = trainer.ranks.all_reduce_sums(trainer.stepper.counts(micro_batches))
    totals, norm = trainer.stepper.step(micro_batches, counts, 1e-3)
    empty = [prepared(batch, precision, 0) for batch in next(global_batches)]
    totals, counts_of_empty, _ = trainer._reduce(totals, empty, torch.zeros(()))
    numbers = {f"total/{k}": v.tolist() for k, v in totals.items()} | {k: v.tolist() for k, v in counts.items()}
    trainer.trained.update = update
    changed_by_empty = step_without_leaf(trainer, empty, counts_of_empty)
    leaf_pixels = [int(batch.leaf_mask.sum()) for batch in micro_batches]
    row = {"rank": trainer.ranks.rank, "leaf_pixels": leaf_pixels, "changed_by_empty": changed_by_empty}
    Path(folder, f"{name}-rank-{trainer.ranks.rank}.json").write_text(json.dumps(row))
    if trainer.ranks.is_main:
        save_file(gradients, Path(folder, f"{name}.safetensors"))
        Path(folder, f"{name}.json").write_text(json.dumps({**numbers, "grad_norm": float(norm)}))


def prepared(batch: Batch, precision: str, slots_with_leaf: int) -> Batch:
    tiles, leaf_mask = batch.tiles.clone(), batch.leaf_mask.clone()
    for row, sample in enumerate(batch.plan.samples):
        if sample.slot >= slots_with_leaf:
            leaf_mask[row] = False
    return replace(batch, tiles=tiles if precision == "float32" else tiles.double(), leaf_mask=leaf_mask)


def whole_gradient(trainer: Trainer, weight: torch.nn.Parameter) -> torch.Tensor:
    if isinstance(trainer.trained, ReplicatedWeights):
        assert weight.grad is not None
        return weight.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(weight)


def step_without_leaf(trainer: Trainer, micro_batches: list[Batch], counts: dict[str, torch.Tensor]) -> list[str]:
    """Run a step without leaf, and return what it changed. The step must be counted."""
    assert int(counts["valid_pixels"]) == 0
    kept = {name: value.clone() for name, value in trainer._tensors()}
    updates = trainer.trained.updates
    _, norm = trainer.stepper.step(micro_batches, counts, 1e-3)
    trainer.skipped_steps.add(1, norm, counts)
    trainer.skipped_steps.check(None)
    changed = [name for name, value in trainer._tensors() if not torch.equal(value, kept[name])]
    counted = (trainer.skipped_steps.empty, trainer.skipped_steps.nonfinite) == (1, 0)
    return changed[:3] + ["updates"] * (trainer.trained.updates != updates) + ["count"] * (not counted)


ranks = join_ranks()
for case in json.loads(cases):
    record(case["name"], case["precision"], case["half_empty"], case["changed"])
