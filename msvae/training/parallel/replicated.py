"""Every rank holds all weights: one process, or DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import AutocastModel, LossScale
from msvae.training.optim import AveragingAdamW
from msvae.training.parallel.trained_weights import Named, Trained, norm_of


class Replicated(Trained):
    """Gradients are summed over ranks; then every rank takes the same step."""

    def __init__(self, ranks: Ranks, model: AutocastModel, optimizer: AveragingAdamW, max_norm: float) -> None:
        super().__init__(model, optimizer)
        self.forward = ranks.engine.wrap(model)
        self.copies = ranks.world_size
        self._max_norm = max_norm or float("inf")
        for parameter in self.named.values():
            optimizer.begin(parameter)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Ranks meet in the backward pass of the last micro batch alone."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        no_sync: AbstractContextManager[None] = self.forward.no_sync()
        return no_sync

    def backward(self, loss: Tensor, scale: LossScale) -> None:
        """Add to the gradients."""
        (loss * scale.value).backward()  # type: ignore[no-untyped-call]

    def update(self, scale: LossScale) -> Tensor:
        """Take a step, all on the device."""
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        norm = (norm_of(gradients) / scale.value).float()
        self._optimizer.found_inf = (~norm.isfinite()).float()
        torch._foreach_mul_(gradients, (self._max_norm / (norm + 1e-6)).clamp(max=1.0) / scale.value)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def settle(self, loss: Callable[[], Tensor]) -> None:
        """DDP lays out its buckets after the first backward pass, so there is one whose gradient is thrown away."""
        if isinstance(self.forward, DistributedDataParallel):
            loss().backward()  # type: ignore[no-untyped-call]
            self._optimizer.zero_grad()

    def values(self, kind: str) -> Iterator[Named]:
        """The tensors themselves."""
        for name, parameter in self.named.items():
            yield name, parameter.detach() if kind == "model" else self._optimizer.state[parameter][kind]

    def put(self, kind: str, name: str, value: Tensor) -> None:
        """Copy."""
        parameter = self.named[name]
        (parameter.detach() if kind == "model" else self._optimizer.state[parameter][kind]).copy_(value)

    def own(self, kind: str) -> list[Tensor]:
        """All of them."""
        return [value for _, value in self.values(kind)]
