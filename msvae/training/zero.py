"""Weights under DeepSpeed ZeRO: every rank holds and updates a shard of the weights, their moments and their average.

DeepSpeed concatenates the weights of a group into one flat float32 tensor, of which each rank holds a part. In stage 3
it splits each weight. A `Fragment` describes which elements of a weight are in this rank's flat tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import AutocastModel, LossScale
from msvae.training.optim import AveragingAdamW
from msvae.training.trained_weights import NamedTensor, TrainedWeights

GATHERED_ELEMENTS = 2**24
"""Full weights are gathered in groups of at least this many elements."""


class Fragment(NamedTuple):
    """Consecutive elements of a weight: `length` elements from `weight_start` on, at `flat_start` in `flat`."""

    flat: Tensor
    flat_start: int
    weight_start: int
    length: int


class ZeroWeights(TrainedWeights):
    """Weights that ZeRO 1, 2 or 3 shards over the ranks. The stages differ only in where fragments are stored."""

    def __init__(
        self, ranks: Ranks, model: AutocastModel, optimizer: AveragingAdamW, max_norm: float, accumulation_steps: int,
        timeout_s: float,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self._ranks = ranks
        self._engine: Any = ranks.engine.wrap_with_deepspeed(model, optimizer, max_norm, accumulation_steps)
        self.forward = self._engine
        self._zero: Any = self._engine.optimizer
        # DeepSpeed creates a process group of its own with torch's default time-out
        _set_pg_timeout(timedelta(seconds=timeout_s), self._zero.dp_process_group)
        self._fragments = {name: self._find_fragment(weight) for name, weight in self.parameters.items()}
        for flat in {fragment.flat for fragment in self._fragments.values() if fragment is not None}:
            optimizer.init_state(flat)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Set in DeepSpeed if this is the last micro batch of the global batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, scale: LossScale) -> None:
        """Add the gradient. DeepSpeed itself multiplies the loss by the scale."""
        if scale.enabled:
            self._zero.override_loss_scale(float(scale.value))
        self._engine.backward(loss, scale_wrt_gas=False)

    def update(self, scale: LossScale) -> Tensor:
        """Take a step. DeepSpeed reduces the norm over ranks, and takes no step if it is not finite."""
        self._engine.step()
        norm = float("inf") if self._zero.overflow else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._ranks.device)

    def full_tensors(self, kind: str) -> Iterator[NamedTensor]:
        """Yield full tensors. Small ones are gathered over ranks together."""
        names: list[str] = []
        for name in self.shapes:
            names.append(name)
            if sum(self.shapes[chosen].numel() for chosen in names) >= GATHERED_ELEMENTS:
                yield from self._gather(kind, names)
                names = []
        yield from self._gather(kind, names)

    def load(self, kind: str, name: str, value: Tensor) -> None:
        """Copy this rank's elements of a full tensor."""
        if (fragment := self._fragments[name]) is not None:
            start = fragment.weight_start
            self._tensor(kind, fragment).copy_(value.flatten()[start : start + fragment.length])

    def local_tensors(self, kind: str) -> list[Tensor]:
        """Return this rank's fragments. The padding after them in DeepSpeed's flat tensors is uninitialised memory."""
        return [self._tensor(kind, fragment) for fragment in self._fragments.values() if fragment is not None]

    def _gather(self, kind: str, names: list[str]) -> Iterator[NamedTensor]:
        sizes = [self.shapes[name].numel() for name in names]
        gathered = torch.zeros(sum(sizes), device=self._ranks.device)
        for name, own in zip(names, torch.split(gathered, sizes), strict=True):
            if (fragment := self._fragments[name]) is not None:
                own[fragment.weight_start : fragment.weight_start + fragment.length] = self._tensor(kind, fragment)
        # each element is 0 on all ranks but one, so that the sum changes no bit
        self._ranks.all_reduce_sum(gathered)
        for name, full in zip(names, torch.split(gathered, sizes), strict=True):
            yield name, full.view(self.shapes[name])

    def _tensor(self, kind: str, fragment: Fragment) -> Tensor:
        flat = fragment.flat if kind == "model" else self._optimizer.state[fragment.flat][kind]
        return flat.detach().narrow(0, fragment.flat_start, fragment.length)

    def _find_fragment(self, weight: Any) -> Fragment | None:
        """Return this rank's elements of a weight, or None if it has none."""
        if self._ranks.engine.shards_weights:
            group, flat_start, length = self._zero.grad_position[self._zero.get_param_id(weight)]
            weight_start = self._ranks.rank * length
            length = min(length, weight.ds_numel - weight_start)
            flat = self._zero.fp32_partitioned_groups_flat[group]
            return Fragment(flat, flat_start, weight_start, length) if length > 0 else None
        if (mapping := weight._hp_mapping) is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        in_flat, in_weight = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return Fragment(flat, in_flat.start, in_weight.start, in_flat.numel)
