"""Adapters between N spectral bands and the three channels of the backbone."""

from __future__ import annotations

from torch import Tensor, nn


class BandAdapter(nn.Module):
    """Three convolutions over neighbouring pixels, alone or beside a linear map of each spectrum.

    With form `residual` the convolutions start at zero: at the start the adapter is exactly linear, so it can be set
    to a known projection, and training adds the rest. With form `convolution` there is no linear map.
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
        """(B, in, H, W) -> (B, out, H, W)."""
        adapted: Tensor = self.convolutions(x)
        return adapted if self.linear is None else self.linear(x) + adapted
