"""The trained weights, their gradients and optimizer state, on every rank (one process, DDP) or sharded (ZeRO)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.distributed.precision import AutocastModel, LossScale
from msvae.training.optim import AVERAGE, AveragingAdamW

NamedTensor = tuple[str, Tensor]


def distribute(ranks: Ranks, model: AutocastModel, optimizer: AveragingAdamW, config: Config) -> TrainedWeights:
    """Distribute a model over the ranks as the launcher asks: on every rank, or sharded by DeepSpeed."""
    max_norm = config.optim.max_grad_norm
    if not ranks.engine.uses_deepspeed:
        return ReplicatedWeights(ranks, model, optimizer, max_norm)
    # imported here, because DeepSpeed searches for compilers when it is imported
    from msvae.training.zero import ZeroWeights

    accumulation_steps = config.accumulation_steps(ranks.world_size)
    return ZeroWeights(ranks, model, optimizer, max_norm, accumulation_steps, config.train.timeout_s)


class TrainedWeights(ABC):
    """The trainable weights, their gradients and their optimizer state.

    Every rank calls every method, in the same order. `kind` names one of the tensors that exist for each weight:
    `model` for the weight itself, or a name of `AveragingAdamW.state_names`.
    """

    forward: nn.Module
    """The wrapped model. It is called like the model."""
    copies: int = 1
    """Number of ranks that hold each weight."""

    def __init__(self, model: AutocastModel, optimizer: AveragingAdamW) -> None:
        self._optimizer = optimizer
        self.parameters = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
        self.shapes = {name: weight.shape for name, weight in self.parameters.items()}
        self.invalid: Tensor | None = None
        """Where this bool is True on any rank, the gradients of the following backward passes become NaN."""
        # A loss of NaN would not have this effect: selecting leaf pixels turns its gradient into 0, with which the
        # optimizer would still decay weights and moments.
        smallest = min(self.parameters.values(), key=torch.Tensor.numel)
        smallest.register_hook(self._invalidate)  # type: ignore[no-untyped-call]

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Return the context for the passes of a micro batch. Args: True for the last one of its global batch."""

    @abstractmethod
    def backward(self, loss: Tensor, scale: LossScale) -> None:
        """Add the gradient of this rank's loss. The gradient of a step is the mean over ranks of these sums."""

    @abstractmethod
    def update(self, scale: LossScale) -> Tensor:
        """Update the weights, unless the gradient is not finite, and reset the gradient.

        Returns: norm of the gradient before clipping, without the loss scale; not finite if nothing was changed.
        """

    def warm_up(self, loss: Callable[[], Tensor]) -> None:  # noqa: B027 only DDP needs it
        """Run and discard one backward pass, so that DDP's summation order survives a resume."""

    @abstractmethod
    def full_tensors(self, kind: str) -> Iterator[NamedTensor]:
        """Yield name and full tensor of each weight. A tensor is valid until the next one is requested."""

    @abstractmethod
    def load(self, kind: str, name: str, value: Tensor) -> None:
        """Set one of `full_tensors` to a full tensor that every rank holds."""

    @abstractmethod
    def local_tensors(self, kind: str) -> list[Tensor]:
        """Return the parts of `full_tensors` that this rank holds."""

    @torch.no_grad()
    def squared_norms(self) -> Tensor:
        """Return this rank's share of two squared norms, (2,) float64.

        The first norm is that of the weights minus their average, the second that of the weights. The shares of all
        ranks are to be added.
        """
        if not (weights := self.local_tensors("model")):  # with very many ranks, DeepSpeed gives some only padding
            return torch.zeros(2, dtype=torch.float64)
        differences = torch._foreach_sub(weights, self.local_tensors(AVERAGE))
        return torch.stack([norm_of(tensors).square() for tensors in (differences, weights)]) / self.copies

    @property
    def updates(self) -> int:
        """Number of steps that changed the weights."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    @updates.setter
    def updates(self, number: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(float(number))

    def _invalidate(self, gradient: Tensor) -> Tensor:
        return gradient if self.invalid is None else torch.where(self.invalid, torch.nan, gradient)


class ReplicatedWeights(TrainedWeights):
    """Weights that every rank holds: one process, or DDP. Gradients are averaged; every rank takes the same step."""

    def __init__(self, ranks: Ranks, model: AutocastModel, optimizer: AveragingAdamW, max_norm: float) -> None:
        super().__init__(model, optimizer)
        self.forward = ranks.engine.wrap(model)
        self.copies = ranks.world_size
        self._max_norm = max_norm or float("inf")
        for parameter in self.parameters.values():
            optimizer.init_state(parameter)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which DDP reduces gradients only in the backward pass of the last micro batch."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        no_sync: AbstractContextManager[None] = self.forward.no_sync()
        return no_sync

    def backward(self, loss: Tensor, scale: LossScale) -> None:
        """Add the gradient of the scaled loss."""
        (loss * scale.value).backward()  # type: ignore[no-untyped-call]

    def update(self, scale: LossScale) -> Tensor:
        """Clip the gradient and take a step, without waiting for the device."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = (norm_of(gradients) / scale.value).float()
        self._optimizer.found_inf = (~norm.isfinite()).float()
        torch._foreach_mul_(gradients, (self._max_norm / (norm + 1e-6)).clamp(max=1.0) / scale.value)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def warm_up(self, loss: Callable[[], Tensor]) -> None:
        """Run and discard one backward pass. DDP arranges its gradient buckets after the first one."""
        if isinstance(self.forward, DistributedDataParallel):
            loss().backward()  # type: ignore[no-untyped-call]
            self._optimizer.zero_grad()

    def full_tensors(self, kind: str) -> Iterator[NamedTensor]:
        """Yield the tensors themselves, not copies."""
        for name in self.parameters:
            yield name, self._tensor(kind, name)

    def load(self, kind: str, name: str, value: Tensor) -> None:
        """Copy a full tensor."""
        self._tensor(kind, name).copy_(value)

    def local_tensors(self, kind: str) -> list[Tensor]:
        """Return all tensors."""
        return [value for _, value in self.full_tensors(kind)]

    def _tensor(self, kind: str, name: str) -> Tensor:
        parameter = self.parameters[name]
        return parameter.detach() if kind == "model" else self._optimizer.state[parameter][kind]


def norm_of(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Return the norm of all elements of some tensors, () float64.

    A CPU that adds 10 million elements in float32 would lose 1e-3 of the norm.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)))
    return norm
