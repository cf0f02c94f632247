"""Modules around the backbone: adapters between N spectral bands and its three channels, and spectral attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msvae.losses.terms import upcast


class BandAdapter(nn.Module):
    """Three convolutions of kernel size 3, with or without a parallel linear map of each spectrum.

    The form `residual` has the linear map, and its last convolution is initialised to zero. The adapter is then linear
    at the start and can be set to a known projection. The form `convolution` has no linear map.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, form: str = "residual") -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, out_channels, kernel_size=3, padding=1),
        )
        self.linear = nn.Conv2d(in_channels, out_channels, kernel_size=1) if form == "residual" else None
        if self.linear is not None:
            for parameter in self.convolutions[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted channels, (B, in, H, W) -> (B, out, H, W)."""
        adapted: Tensor = self.convolutions(x)
        return adapted if self.linear is None else self.linear(x) + adapted


class SpectralAttention(nn.Module):
    """Multiplies each band by a weight from 0 to 2 that depends on the mean spectrum. Initially all weights are 1."""

    def __init__(self, num_bands: int) -> None:
        super().__init__()
        hidden = max(8, num_bands)
        last = nn.Linear(hidden, num_bands)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.gate = nn.Sequential(nn.Linear(num_bands, hidden), nn.SiLU(), last)

    def weights(self, bands_BCHW: Tensor, valid_BCHW: Tensor | None = None) -> Tensor:
        """Return the weight of each band in each tile, (B, C).

        The mean spectrum is computed over the valid elements, or over all elements without `valid_BCHW`.
        """
        if valid_BCHW is None:
            spectrum = bands_BCHW.mean(dim=(2, 3))
        else:
            # a sum over pixels would overflow in float16
            total = torch.where(valid_BCHW, upcast(bands_BCHW), 0.0).sum(dim=(2, 3))
            spectrum = (total / valid_BCHW.sum(dim=(2, 3)).clamp(min=1)).to(bands_BCHW.dtype)
        return self.weights_of_spectrum(spectrum)

    def weights_of_spectrum(self, spectrum_BC: Tensor) -> Tensor:
        """Return the weight of each band for a mean spectrum, (B, C)."""
        return 2 * torch.sigmoid(self.gate(spectrum_BC))

    def forward(self, bands_BCHW: Tensor, valid_BCHW: Tensor | None = None) -> Tensor:
        """Return the bands times their weights, (B, C, H, W)."""
        return bands_BCHW * self.weights(bands_BCHW, valid_BCHW)[:, :, None, None]
