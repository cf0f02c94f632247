"""A sum and the count behind it. Ranks and micro batches join by adding; the division comes once, at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskedSum:
    """Total over valid elements and how many there were; both () or both (C,)."""

    total: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """Total over count, element by element; 0 where nothing was counted."""
        return _ratio(self.total, self.count)

    def overall(self) -> Tensor:
        """Mean over bands of the mean of each band that has valid elements, ()."""
        return divide_once(self.total, self.count)


def divide_once(total: Tensor, count: Tensor) -> Tensor:
    """Scalar mean of per-band means, over the bands that have valid elements at all."""
    return _ratio(total, count).sum() / torch.count_nonzero(count).clamp(min=1)


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """Total over count, 0 where nothing was counted. Counts of latent cells are fractions, so they may be under 1."""
    return torch.where(count > 0, total / torch.where(count > 0, count, 1), 0.0)
