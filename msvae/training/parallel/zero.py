"""DeepSpeed's ZeRO: every rank holds and updates a share of the weights, of their moments and of their average.

DeepSpeed lays the weights of a group end to end in a flat float32 tensor and gives each rank a part of it; in stage 3
it cuts each weight. A `Fragment` says where elements of a weight lie in this rank's flat tensors.
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
from msvae.training.parallel.trained_weights import Named, Trained

JOINED_ELEMENTS = 2**24
"""Of whole weights that are joined at once."""


class Fragment(NamedTuple):
    """Elements of a weight from `first` on, which lie in `flat` from `at` on."""

    flat: Tensor
    at: int
    first: int
    length: int


class Zero(Trained):
    """Stages 1 to 3, told apart only by where fragments lie."""

    def __init__(
        self, ranks: Ranks, model: AutocastModel, optimizer: AveragingAdamW,
        max_norm: float, accumulation_steps: int, timeout_s: float,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer)
        self._ranks = ranks
        self._engine: Any = ranks.engine.wrap_with_deepspeed(model, optimizer, max_norm, accumulation_steps)
        self.forward = self._engine
        self._zero: Any = self._engine.optimizer
        self._bound_waits(timeout_s)
        self._fragments = dict(self._find_fragments(ranks.engine.zero_stage))
        for flat in {fragment.flat for fragments in self._fragments.values() for fragment in fragments}:
            optimizer.begin(flat)

    def _bound_waits(self, timeout_s: float) -> None:
        """DeepSpeed makes a group of its own, with torch's time-out."""
        _set_pg_timeout(timedelta(seconds=timeout_s), self._zero.dp_process_group)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Tell DeepSpeed where it is in the global batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, scale: LossScale) -> None:
        """Add to the gradients; DeepSpeed itself multiplies by the scale."""
        if scale.enabled:
            self._zero.override_loss_scale(float(scale.value))
        self._engine.backward(loss, scale_wrt_gas=False)

    def update(self, scale: LossScale) -> Tensor:
        """Take a step; DeepSpeed joins the norms of all ranks and takes none where theirs is not finite."""
        self._engine.step()
        norm = float("inf") if self._zero.overflow else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._ranks.device)

    def values(self, kind: str) -> Iterator[Named]:
        """Joined over ranks, some weights at a time."""
        names: list[str] = []
        for name in self.shapes:
            names.append(name)
            if sum(self.shapes[chosen].numel() for chosen in names) >= JOINED_ELEMENTS:
                yield from self._joined(kind, names)
                names = []
        yield from self._joined(kind, names)

    def put(self, kind: str, name: str, value: Tensor) -> None:
        """Keep this rank's elements."""
        for fragment in self._fragments[name]:
            self._of(kind, fragment).copy_(value.flatten()[fragment.first : fragment.first + fragment.length])

    def own(self, kind: str) -> list[Tensor]:
        """Its fragments: what fills up DeepSpeed's flat tensors after the last weight is whatever memory held."""
        return [self._of(kind, fragment) for fragments in self._fragments.values() for fragment in fragments]

    def _joined(self, kind: str, names: list[str]) -> Iterator[Named]:
        sizes = [self.shapes[name].numel() for name in names]
        joined = torch.zeros(sum(sizes), device=self._ranks.device)
        for name, own in zip(names, torch.split(joined, sizes), strict=True):
            for fragment in self._fragments[name]:
                own[fragment.first : fragment.first + fragment.length] = self._of(kind, fragment)
        self._ranks.all_reduce_sum(joined)
        for name, whole in zip(names, torch.split(joined, sizes), strict=True):
            yield name, whole.view(self.shapes[name])

    def _of(self, kind: str, fragment: Fragment) -> Tensor:
        flat = fragment.flat if kind == "model" else self._optimizer.state[fragment.flat][kind]
        return flat.detach().narrow(0, fragment.at, fragment.length)

    def _find_fragments(self, stage: int) -> Iterator[tuple[str, list[Fragment]]]:
        for name, weight in self.named.items():
            fragment = self._cut_weight(weight) if stage == 3 else self._cut_group(weight)
            yield name, [] if fragment is None else [fragment]

    def _cut_group(self, weight: Any) -> Fragment | None:
        if (lies := weight._hp_mapping) is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[lies.param_group_index]
        at, first = lies.get_hp_fragment_address(), lies.lp_fragment_address
        return Fragment(flat, at.start, first.start, at.numel)

    def _cut_weight(self, weight: Any) -> Fragment | None:
        group, at, count = self._zero.grad_position[self._zero.get_param_id(weight)]
        first = self._ranks.rank * count
        count = min(count, weight.ds_numel - first)
        return Fragment(self._zero.fp32_partitioned_groups_flat[group], at, first, count) if count > 0 else None
