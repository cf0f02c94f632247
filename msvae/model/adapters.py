"""Adapters between N spectral bands and the three channels of the backbone."""

from __future__ import annotations

from torch import Tensor, nn


class BandAdapter(nn.Module):
    """A linear map of each spectrum, plus a three-layer convolution that starts at zero.

    At the start the adapter is exactly linear, so it can be set to a known projection; training adds the rest.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        last = nn.Conv2d(width, out_channels, kernel_size=3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.SiLU(),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        adapted: Tensor = self.linear(x) + self.residual(x)
        return adapted
