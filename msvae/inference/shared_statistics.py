"""What a model takes from a picture as a whole, fixed for all windows of an image, so that each is seen alike.

GroupNorm and spectral attention use means over all they see. Taken of each window alone they would differ from window
to window, and from those of the image in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from msvae.model.attention import SpectralAttention
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter


class SharedStatistics:
    """The statistics of one picture, recorded while the model sees it, then used for others. A context manager.

    While it is recording, which is how it begins, the model works as ever.
    """

    def __init__(self, model: AutoencoderKLMultispectralAdapter) -> None:
        self.recording = True
        self._of_norm: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._of_gate: dict[nn.Module, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                self._hooks.append(module.register_forward_hook(self._norm))
            elif isinstance(module, SpectralAttention):
                self._hooks.append(module.gate.register_forward_hook(self._gate))

    def __enter__(self) -> SharedStatistics:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _norm(self, norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Scale and shift of each channel, (C,), by the mean and variance of its group."""
        assert isinstance(norm, nn.GroupNorm)
        (x,) = inputs
        if self.recording:
            variance_G, mean_G = torch.var_mean(x[0].reshape(norm.num_groups, -1).float(), dim=1, correction=0)
            scale_C, mean_C = (
                of_group.repeat_interleave(norm.num_channels // norm.num_groups)
                for of_group in ((variance_G + norm.eps).rsqrt(), mean_G)
            )
            scale_C = scale_C * norm.weight
            self._of_norm[norm] = scale_C, norm.bias - mean_C * scale_C
            return output
        one_a_channel = (-1,) + (1,) * (x.ndim - 2)
        scale_C, shift_C = self._of_norm[norm]
        return x * scale_C.view(one_a_channel) + shift_C.view(one_a_channel)

    def _gate(self, gate: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """What becomes the weights of the bands, (B, C)."""
        if self.recording:
            self._of_gate[gate] = output
        return self._of_gate[gate].expand_as(output)
