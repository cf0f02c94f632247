"""Two changes to the backbone of diffusers: gradient checkpointing by residual block, and upsampling that compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint


class ResidualCheckpointingMixin(ModelMixin):  # type: ignore[misc]
    """A model with gradient checkpointing of single residual blocks.

    The backward pass then holds the activations of one residual block at a time. diffusers checkpoints whole up and
    down blocks, which contain three or more residual blocks. That needs the same time and over twice the memory.
    """

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of residual blocks for the backward pass, and recompute the blocks."""
        for block in self._residual_blocks():
            block.forward = partial(checkpoint, type(block).forward.__get__(block), use_reentrant=False)

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass."""
        for block in self._residual_blocks():
            vars(block).pop("forward", None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Return True if residual blocks are recomputed in the backward pass."""
        return any("forward" in vars(block) for block in self._residual_blocks())

    def _residual_blocks(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, ResnetBlock2D))


class NearestUpsample(nn.Module):
    """Nearest upsampling by 2, then a convolution; it has the parameter names of Upsample2D of diffusers.

    Compiled code repeats pixels with `expand` instead of `interpolate`, which is compiled to indexing. Inductor
    (torch 2.13) may read the gradient of indexing too early.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Return the upsampled channels, (B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(_expanded(x) if torch.compiler.is_compiling() else interpolate(x, scale_factor=2.0))  # type: ignore[no-any-return]


def replace_upsamplers(decoder: Decoder) -> None:
    """Replace the upsamplers of a decoder by NearestUpsample with the same convolutions."""
    for block in decoder.up_blocks:
        if block.upsamplers is not None:
            block.upsamplers = nn.ModuleList(NearestUpsample(upsampler.conv) for upsampler in block.upsamplers)


def _expanded(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    twice = x[:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
    return twice.reshape(batch, channels, 2 * height, 2 * width)
