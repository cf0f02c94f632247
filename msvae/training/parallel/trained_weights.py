"""What training changes, however it is spread over the ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from msvae.distributed.precision import AutocastModel, LossScale
from msvae.training.optim import AVERAGE, AveragingAdamW

Named = tuple[str, Tensor]


class Trained(ABC):
    """The trainable weights, their gradients and what the optimizer keeps of them.

    `forward` is called like the model. Every rank calls every method, in the same order. Where `spoilt` is True on any
    rank, gradients from then on are not finite.
    """

    forward: nn.Module
    copies: int = 1
    """Ranks that hold each weight."""

    def __init__(self, model: AutocastModel, optimizer: AveragingAdamW) -> None:
        self._optimizer = optimizer
        self.named = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
        self.shapes = {name: weight.shape for name, weight in self.named.items()}
        self.spoilt: Tensor | None = None
        # a loss of NaN would not do: selecting leaf pixels turns its gradient into 0, which decays weights and moments
        min(self.named.values(), key=torch.Tensor.numel).register_hook(self._spoil)  # type: ignore[no-untyped-call]

    def _spoil(self, gradient: Tensor) -> Tensor:
        return gradient if self.spoilt is None else torch.where(self.spoilt, torch.nan, gradient)

    @abstractmethod
    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds the forward and backward pass of a micro batch; `last` of its global batch."""

    @abstractmethod
    def backward(self, loss: Tensor, scale: LossScale) -> None:
        """Add the gradient of this rank's loss; the gradient of a step is the mean over ranks of these sums."""

    @abstractmethod
    def update(self, scale: LossScale) -> Tensor:
        """Change the weights by the gradient, unless it is not finite, and forget it.

        Returns: the norm of the gradient before clipping, without the loss scale; not finite when nothing was changed.
        """

    def settle(self, loss: Callable[[], Tensor]) -> None:  # noqa: B027 most have nothing to settle
        """Do before the first step what would otherwise happen in it and change the order in which ranks are added."""

    @abstractmethod
    def values(self, kind: str) -> Iterator[Named]:
        """Name and whole tensor of every weight, valid until the next is asked for.

        Args: `model`, or what the optimizer keeps (`AveragingAdamW.kept`).
        """

    @abstractmethod
    def put(self, kind: str, name: str, value: Tensor) -> None:
        """Set one of `values` to a whole tensor that every rank holds."""

    @abstractmethod
    def own(self, kind: str) -> list[Tensor]:
        """What this rank holds of the tensors of `values`."""

    @torch.no_grad()
    def squares_from_average(self) -> Tensor:
        """This rank's share of two squared norms, (2,): of the weights less their average, and of the weights.

        Shares of all ranks add up.
        """
        if not (weights := self.own("model")):  # a rank of very many, whose share DeepSpeed fills up
            return torch.zeros(2, dtype=torch.float64)
        apart = torch._foreach_sub(weights, self.own(AVERAGE))
        return torch.stack([norm_of(tensors).square() for tensors in (apart, weights)]) / self.copies

    @property
    def updates(self) -> int:
        """Steps that changed the weights."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    @updates.setter
    def updates(self, number: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(float(number))


def norm_of(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Norm of all elements, added up in float64: in float32 a CPU loses 1e-3 of it over 10 million elements."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)))
    return norm
