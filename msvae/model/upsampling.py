"""Nearest upsampling whose gradient survives compilation."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.nn.functional import interpolate


class NearestUpsample(nn.Module):
    """Every pixel twice in both directions, then a convolution: diffusers' Upsample2D, with its parameter names.

    Compiled, it expands and does not index: Inductor (torch 2.13) may read the gradient of indexing too early.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(_expanded(x) if torch.compiler.is_compiling() else interpolate(x, scale_factor=2.0))  # type: ignore[no-any-return]


def put_upsampling(decoder: Decoder) -> None:
    """Give the decoder NearestUpsample around its own convolutions."""
    for block in decoder.up_blocks:
        if block.upsamplers is not None:
            block.upsamplers = nn.ModuleList(NearestUpsample(upsampler.conv) for upsampler in block.upsamplers)


def _expanded(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    twice = x[:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
    return twice.reshape(batch, channels, 2 * height, 2 * width)
