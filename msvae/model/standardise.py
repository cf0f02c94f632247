"""Leaf statistics of reflectance inside a model: exact, whatever the precision of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from diffusers import ModelMixin
from torch import Tensor

from msvae.bands import Bands
from msvae.messages import counted
from msvae.model.initialise import SMALLEST_STD


class HoldsLeafStatistics(ModelMixin):  # type: ignore[misc]
    """A model with `leaf_mean` and `leaf_std`, (C,) float32, made from `band_mean` and `band_std` of its config."""

    bands: Bands
    leaf_mean: Tensor
    leaf_std: Tensor

    def register_leaf_statistics(self) -> None:
        """Make the buffers; weights files do not hold them, the config does."""
        mean, std = self._leaf_statistics()
        self.register_buffer("leaf_mean", mean, persistent=False)
        self.register_buffer("leaf_std", std, persistent=False)

    def _leaf_statistics(self) -> tuple[Tensor, Tensor]:
        mean = _per_band(self.config.band_mean, 0.0, len(self.bands))
        return mean, _per_band(self.config.band_std, 1.0, len(self.bands)).clamp(min=SMALLEST_STD)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move and cast comes through here. The statistics only move: half precision would round reflectance."""
        super()._apply(fn, recurse)
        self.leaf_mean, self.leaf_std = (part.to(self.leaf_mean.device) for part in self._leaf_statistics())
        return self


def _per_band(values: Sequence[float] | None, default: float, num_bands: int) -> Tensor:
    if values is not None and len(values) != num_bands:
        raise ValueError(
            f"got statistics of {counted(len(values), 'band')} for a model of {num_bands}; give one value a band"
        )
    return torch.tensor([default] * num_bands if values is None else list(values), dtype=torch.float32)
