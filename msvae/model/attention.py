"""Spectral attention: one weight a band, from the mean spectrum of what the model sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SpectralAttention(nn.Module):
    """Weighs each band by a gate in 0..2 that depends on the mean spectrum; starts as identity."""

    def __init__(self, num_bands: int) -> None:
        super().__init__()
        hidden = max(8, num_bands)
        last = nn.Linear(hidden, num_bands)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.gate = nn.Sequential(nn.Linear(num_bands, hidden), nn.SiLU(), last)

    def weights(self, bands_BCHW: Tensor, valid_BCHW: Tensor | None = None) -> Tensor:
        """Weight of each band in each tile, (B, C); with `valid`, from valid elements alone."""
        if valid_BCHW is None:
            spectrum = bands_BCHW.mean(dim=(2, 3))
        else:
            # a sum over pixels would overflow in float16
            exact = bands_BCHW.to(torch.promote_types(bands_BCHW.dtype, torch.float32))
            total = torch.where(valid_BCHW, exact, 0.0).sum(dim=(2, 3))
            spectrum = (total / valid_BCHW.sum(dim=(2, 3)).clamp(min=1)).to(bands_BCHW.dtype)
        return self.weights_of_spectrum(spectrum)

    def weights_of_spectrum(self, spectrum_BC: Tensor) -> Tensor:
        """Weight of each band for a mean spectrum, (B, C)."""
        return 2 * torch.sigmoid(self.gate(spectrum_BC))

    def forward(self, bands_BCHW: Tensor, valid_BCHW: Tensor | None = None) -> Tensor:
        """Bands times their weights, (B, C, H, W)."""
        return bands_BCHW * self.weights(bands_BCHW, valid_BCHW)[:, :, None, None]
