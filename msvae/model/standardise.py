"""Standardisation of reflectance by leaf statistics, which are float32 for weights of any precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from diffusers import ModelMixin
from torch import Tensor

from msvae.bands import Bands
from msvae.messages import counted
from msvae.model.initialise import SMALLEST_STD


class LeafStandardisationMixin(ModelMixin):  # type: ignore[misc]
    """A model with buffers `leaf_mean` and `leaf_std`, (C,) float32, from `band_mean` and `band_std` of its config."""

    bands: Bands
    leaf_mean: Tensor
    leaf_std: Tensor

    def register_leaf_statistics(self) -> None:
        """Create the buffers. They are not saved with the weights, because the config holds them."""
        mean, std = self._leaf_statistics()
        self.register_buffer("leaf_mean", mean, persistent=False)
        self.register_buffer("leaf_std", std, persistent=False)

    def standardise(self, x_BCHW: Tensor, valid_BCHW: Tensor) -> Tensor:
        """Return reflectance minus the leaf mean, in units of the leaf standard deviation of each band, (B, C, H, W).

        With background `fill`, elements that are not valid become the mean leaf spectrum, which is 0. Otherwise
        GroupNorm and attention would carry the background into leaf pixels. With `keep`, only elements that are not
        finite become 0.
        """
        standardised = (x_BCHW - self.leaf_mean[:, None, None]) / self.leaf_std[:, None, None]
        visible = x_BCHW.isfinite() if self.config.background == "keep" else valid_BCHW
        return torch.where(visible, standardised, 0.0)

    def to_reflectance(self, standardised_BCHW: Tensor) -> Tensor:
        """Return the reflectance of standardised bands, (B, C, H, W)."""
        return standardised_BCHW * self.leaf_std[:, None, None] + self.leaf_mean[:, None, None]

    def _leaf_statistics(self) -> tuple[Tensor, Tensor]:
        mean = _per_band(self.config.band_mean, 0.0, len(self.bands))
        return mean, _per_band(self.config.band_std, 1.0, len(self.bands)).clamp(min=SMALLEST_STD)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the model, as torch does, but keep the statistics in float32.

        Half precision would round reflectance.
        """
        super()._apply(fn, recurse)
        self.leaf_mean, self.leaf_std = (part.to(self.leaf_mean.device) for part in self._leaf_statistics())
        return self


def _per_band(values: Sequence[float] | None, default: float, num_bands: int) -> Tensor:
    if values is not None and len(values) != num_bands:
        raise ValueError(
            f"got statistics of {counted(len(values), 'band')} for a model of {num_bands}; pass one value per band"
        )
    return torch.tensor([default] * num_bands if values is None else list(values), dtype=torch.float32)
